//! `template`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;
use warren_proto::v1::{
    CreateTemplateRequest, DeleteTemplateRequest, GetTemplateRequest, ListTemplatesRequest, Template,
};

use crate::client::{Client, PAGE_SIZE, request_id, templates, within};
use crate::failure::Failure;
use crate::names;
use crate::output::{Output, Row};
use crate::table::{age, bytes, details, joined, last_segment, or_dash};
use crate::upload::{Tar, upload};

#[derive(Debug, Subcommand)]
pub enum TemplateCommand {
    /// Make a template of a root file system tar
    Import {
        /// Id of the template
        name: String,
        /// The tar, uncompressed
        tar: PathBuf,
        /// Main process of sandboxes that name none: one --command for the program and one for each of its arguments
        #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
        command: Vec<String>,
        /// The same, after `--`
        #[arg(last = true, value_name = "COMMAND", conflicts_with = "command")]
        words: Vec<String>,
        /// Environment of every process
        #[arg(long, short, value_name = "KEY=VALUE", value_parser = names::pair)]
        env: Vec<(String, String)>,
        /// Working directory of every process [default: /]
        #[arg(long, value_name = "DIR", default_value = "", hide_default_value = true)]
        workdir: String,
    },
    /// List the templates
    List,
    /// Show one template
    Show {
        /// Id or full name
        name: String,
    },
    /// Remove templates that no sandbox uses
    Delete {
        /// Ids or full names
        #[arg(required = true)]
        names: Vec<String>,
    },
}

impl Row for Template {
    const TYPE: &'static str = "warren.v1.Template";
    const HEADERS: &'static [&'static str] = &["TEMPLATE", "SIZE", "HOLDERS", "DIGEST", "AGE"];

    fn cells(&self) -> Vec<String> {
        vec![
            last_segment(&self.name),
            bytes(self.size_bytes),
            self.holders.len().to_string(),
            self.digest.chars().take(19).collect(),
            age(self.create_time.as_ref()),
        ]
    }

    fn resource_name(&self) -> String {
        self.name.clone()
    }
}

pub async fn run(client: &Client, output: &Output, command: TemplateCommand) -> Result<ExitCode, Failure> {
    match command {
        TemplateCommand::Import { name, tar, command, words, env, workdir } => {
            let defaults = Template {
                default_command: if words.is_empty() { command } else { words },
                environment: env.into_iter().collect(),
                working_directory: workdir,
                ..Template::default()
            };
            let template = import(client, &name, tar, defaults).await?;
            output.one(&template, || template_details(&template))?;
        }
        TemplateCommand::List => output.list(&all(client).await?)?,
        TemplateCommand::Show { name } => {
            let name = names::in_collection("templates", &name);
            let get = |c| {
                let request = client.reading(GetTemplateRequest { name: name.clone() });
                async move { templates(c).get_template(request).await }
            };
            let template = client.call(get).await?;
            output.one(&template, || template_details(&template))?;
        }
        TemplateCommand::Delete { names } => {
            for name in names {
                delete(client, &names::in_collection("templates", &name)).await?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Digest, bytes to a node, then the record. Each step can be made again, so a broken import is simply run again.
async fn import(client: &Client, name: &str, tar: PathBuf, defaults: Template) -> Result<Template, Failure> {
    let tar = Tar::measure(tar).await?;
    upload(client, &tar).await?;
    let template = Template { digest: tar.digest, size_bytes: tar.size_bytes, ..defaults };
    let request = CreateTemplateRequest {
        template_id: name.strip_prefix("templates/").unwrap_or(name).to_owned(),
        template: Some(template),
        request_id: request_id(),
    };
    let create = |c| {
        let request = within(request.clone());
        async move { templates(c).create_template(request).await }
    };
    client.call(create).await
}

/// A delete has no request id: what a retry does not find, the call before it may have deleted.
async fn delete(client: &Client, name: &str) -> Result<(), Failure> {
    let delete = |c| {
        let request = within(DeleteTemplateRequest { name: name.to_owned() });
        async move { templates(c).delete_template(request).await }
    };
    client.call(delete).await?;
    eprintln!("{name} deleted");
    Ok(())
}

fn template_details(template: &Template) -> String {
    details(&[
        ("Name", template.name.clone()),
        ("Digest", template.digest.clone()),
        ("Size", bytes(template.size_bytes)),
        ("Command", or_dash(template.default_command.join(" "))),
        ("Working directory", template.working_directory.clone()),
        ("Environment", joined(&template.environment)),
        ("Holders", or_dash(template.holders.join(", "))),
        ("Created", format!("{} ago", age(template.create_time.as_ref()))),
    ])
}

pub async fn all(client: &Client) -> Result<Vec<Template>, Failure> {
    let mut all = Vec::new();
    let mut page_token = String::new();
    loop {
        let list = |c| {
            let request = client.reading(ListTemplatesRequest { page_size: PAGE_SIZE, page_token: page_token.clone() });
            async move { templates(c).list_templates(request).await }
        };
        let page = client.call(list).await?;
        all.extend(page.templates);
        if page.next_page_token.is_empty() {
            return Ok(all);
        }
        page_token = page.next_page_token;
    }
}
