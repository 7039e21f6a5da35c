//! `template`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;
use warren_proto::v1::{
    CreateTemplateRequest, DeleteTemplateRequest, GetTemplateRequest, ImportedTemplate, ListTemplatesRequest,
    RegistryImage, Template,
};

use crate::client::{Client, PAGE_SIZE, request_id, templates, within};
use crate::failure::Failure;
use crate::import::{self, Named, Source};
use crate::names;
use crate::output::{Output, Row};
use crate::table::{age, bytes, details, joined, last_segment, or_dash};
use crate::upload::{Tar, upload};

#[derive(Debug, Subcommand)]
pub enum TemplateCommand {
    /// Make a template of a root file system or an OCI image layout
    Import {
        /// Id of the template
        name: String,
        /// A directory or tar (plain or gzip) of a root file system, or `oci:PATH[:TAG]` for an image layout
        #[arg(value_name = "PATH")]
        source: String,
        #[command(flatten)]
        defaults: Defaults,
    },
    /// Make a template of an image in a registry; a node pulls it
    Pull {
        /// registry/repository:tag, or @sha256:...; without a registry: Docker Hub
        reference: String,
        /// Id of the template [default: last part of the repository]
        name: Option<String>,
        /// User at the registry
        #[arg(long, requires = "password")]
        username: Option<String>,
        /// Password or token at the registry
        #[arg(long, env = "WARREN_REGISTRY_PASSWORD", hide_env_values = true)]
        password: Option<String>,
        #[command(flatten)]
        defaults: Defaults,
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

/// What sandboxes get that do not say; an image says it too, and these go first.
#[derive(Debug, clap::Args)]
pub struct Defaults {
    /// Main process of sandboxes that name none: one --command for the program and one for each of its arguments
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    command: Vec<String>,
    /// The same, after `--`
    #[arg(last = true, value_name = "COMMAND", conflicts_with = "command")]
    words: Vec<String>,
    /// Environment of every process
    #[arg(long, short, value_name = "KEY=VALUE", value_parser = names::pair)]
    env: Vec<(String, String)>,
    /// Working directory of every process [default: the image's, or /]
    #[arg(long, value_name = "DIR", default_value = "", hide_default_value = true)]
    workdir: String,
}

impl Defaults {
    /// A template of `imported` with these over what its image says.
    fn over(self, imported: ImportedTemplate) -> Template {
        let command = if self.words.is_empty() { self.command } else { self.words };
        let mut environment = imported.environment;
        environment.extend(self.env);
        Template {
            digest: imported.digest,
            size_bytes: imported.size_bytes,
            default_command: if command.is_empty() { imported.default_command } else { command },
            environment,
            working_directory: if self.workdir.is_empty() { imported.working_directory } else { self.workdir },
            ..Template::default()
        }
    }
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
        TemplateCommand::Import { name, source, defaults } => {
            let imported = match import::named(&source)? {
                Named::Tar(path) => uploaded(client, path).await?,
                Named::Other(source) => import::import(client, &source).await?,
            };
            let template = record(client, &name, defaults.over(imported)).await?;
            output.one(&template, || template_details(&template))?;
        }
        TemplateCommand::Pull { reference, name, username, password, defaults } => {
            let name = name.unwrap_or_else(|| id_of(&reference));
            let image = RegistryImage {
                reference,
                username: username.unwrap_or_default(),
                password: password.unwrap_or_default(),
            };
            let imported = import::import(client, &Source::Registry(image)).await?;
            if !imported.user.is_empty() {
                eprintln!("the image's user `{}` is not kept: sandboxes run as root", imported.user);
            }
            let template = record(client, &name, defaults.over(imported)).await?;
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

/// Last part of an image's repository, without tag and digest.
fn id_of(reference: &str) -> String {
    let path = reference.split('@').next().unwrap_or_default();
    let last = path.rsplit('/').next().unwrap_or_default();
    last.split(':').next().unwrap_or_default().to_lowercase().replace(['_', '.'], "-")
}

/// Measures a tar and brings it to a node as it is.
async fn uploaded(client: &Client, path: PathBuf) -> Result<ImportedTemplate, Failure> {
    let tar = Tar::measure(path).await?;
    upload(client, &tar).await?;
    Ok(ImportedTemplate { digest: tar.digest, size_bytes: tar.size_bytes, ..ImportedTemplate::default() })
}

/// Records what a node holds. Every step before it can be made again, so a broken import is simply run again.
async fn record(client: &Client, name: &str, template: Template) -> Result<Template, Failure> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_is_named_after_its_repository() {
        let digest = format!("ghcr.io/a/tool@sha256:{}", "0".repeat(64));
        let cases = [
            ("docker.io/library/python:3.12", "python"),
            ("python", "python"),
            ("localhost:5000/my_app", "my-app"),
            (digest.as_str(), "tool"),
        ];
        for (reference, id) in cases {
            assert_eq!(id_of(reference), id, "{reference}");
        }
    }
}
