//! `context`: looks at the context file and changes it.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde::Serialize;

use crate::Global;
use crate::context::{Context, File, read};
use crate::failure::Failure;
use crate::output::{Format, Output, write};
use crate::table::{Table, details, or_dash};

#[derive(Debug, Subcommand)]
pub enum ContextCommand {
    /// List the contexts of the file
    List,
    /// Make a context the current one
    Use {
        /// Its name
        name: String,
    },
    /// Show a context
    Show {
        /// Its name [default: the current one]
        name: Option<String>,
    },
    /// Make or change a context, by --endpoints, --tenant and the TLS flags: what is not given stays as it is
    Set(SetArgs),
    /// Remove a context
    Remove {
        /// Its name
        name: String,
    },
}

#[derive(Debug, Args)]
pub struct SetArgs {
    /// Its name
    name: String,
    /// Make it the current one too
    #[arg(long)]
    current: bool,
}

pub fn run(global: &Global, output: &Output, command: ContextCommand) -> Result<ExitCode, Failure> {
    let (path, mut file) = read(global)?
        .ok_or_else(|| Failure::Usage("no context file: set HOME, or name one with --contexts".to_owned()))?;
    match command {
        ContextCommand::List => list(output, &file)?,
        ContextCommand::Show { name } => {
            let name = name.or_else(|| global.context.clone()).or_else(|| file.current.clone());
            let name = name.ok_or_else(|| {
                Failure::Usage(format!("{} names no current context: give a name, or `context use`", path.display()))
            })?;
            show(output, &named(&file, &name, file.find(&path, &name)?))?;
        }
        ContextCommand::Use { name } => {
            file.find(&path, &name)?;
            file.current = Some(name);
            file.write(&path)?;
        }
        ContextCommand::Set(args) => {
            file.contexts.entry(args.name.clone()).or_default().set(global);
            // The only context there is, is the one that is meant.
            if args.current || file.contexts.len() == 1 {
                file.current = Some(args.name);
            }
            file.write(&path)?;
        }
        ContextCommand::Remove { name } => {
            file.find(&path, &name)?;
            file.contexts.remove(&name);
            if file.current.as_ref() == Some(&name) {
                file.current = None;
            }
            file.write(&path)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

impl Context {
    fn set(&mut self, global: &Global) {
        if !global.endpoints.is_empty() {
            self.endpoints.clone_from(&global.endpoints);
        }
        let replace = |old: &mut Option<PathBuf>, new: &Option<PathBuf>| {
            // The file is read from other directories too.
            let new = new.as_ref().map(|path| std::path::absolute(path).unwrap_or_else(|_| path.clone()));
            *old = new.or(old.take());
        };
        self.tenant = global.tenant.clone().or(self.tenant.take());
        replace(&mut self.tls_ca, &global.tls_ca);
        replace(&mut self.tls_cert, &global.tls_cert);
        replace(&mut self.tls_key, &global.tls_key);
    }
}

/// A context as it is shown.
#[derive(Debug, Serialize)]
struct Named<'a> {
    name: &'a str,
    current: bool,
    #[serde(flatten)]
    context: &'a Context,
}

fn named<'a>(file: &File, name: &'a str, context: &'a Context) -> Named<'a> {
    Named { name, current: file.current.as_deref() == Some(name), context }
}

fn list(output: &Output, file: &File) -> Result<(), Failure> {
    let all: Vec<Named<'_>> = file.contexts.iter().map(|(name, context)| named(file, name, context)).collect();
    match output.format {
        Format::Table => {
            let mut table = Table::new(&["CURRENT", "CONTEXT", "ENDPOINTS", "TENANT", "TLS"]);
            for Named { name, current, context } in all {
                table.push(vec![
                    if current { "*" } else { "" }.to_owned(),
                    name.to_owned(),
                    or_dash(context.endpoints.join(",")),
                    or_dash(context.tenant.clone().unwrap_or_default()),
                    tls(context).to_owned(),
                ]);
            }
            write(&table.to_string())
        }
        Format::Name => write(&all.iter().map(|one| format!("{}\n", one.name)).collect::<String>()),
        Format::Jsonl => all.iter().try_for_each(|one| output.document(one)),
        Format::Json | Format::Yaml => output.document(&all),
    }
}

fn show(output: &Output, one: &Named<'_>) -> Result<(), Failure> {
    match output.format {
        Format::Table => {
            let path =
                |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string()).unwrap_or_default();
            write(&details(&[
                ("Context", one.name.to_owned()),
                ("Current", if one.current { "yes" } else { "no" }.to_owned()),
                ("Endpoints", one.context.endpoints.join(",")),
                ("Tenant", one.context.tenant.clone().unwrap_or_default()),
                ("TLS CA", path(&one.context.tls_ca)),
                ("TLS certificate", path(&one.context.tls_cert)),
                ("TLS key", path(&one.context.tls_key)),
            ]))
        }
        Format::Name => write(&format!("{}\n", one.name)),
        Format::Json | Format::Jsonl | Format::Yaml => output.document(one),
    }
}

fn tls(context: &Context) -> &'static str {
    match (&context.tls_ca, &context.tls_cert) {
        (None, _) => "no",
        (Some(_), None) => "server",
        (Some(_), Some(_)) => "both",
    }
}
