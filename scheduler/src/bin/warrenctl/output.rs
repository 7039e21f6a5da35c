//! Data on stdout: a table for people, or JSON, YAML or names for programs.

use std::io::{self, Write};

use clap::ValueEnum;
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage};
use serde::Serialize;
use warren_proto::FILE_DESCRIPTOR_SET;

use crate::failure::Failure;
use crate::json::Json;
use crate::table::Table;

/// How data is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Table,
    /// One document
    Json,
    /// One object a line
    Jsonl,
    Yaml,
    /// Resource names only
    Name,
}

/// Writes data in one format.
#[derive(Debug)]
pub struct Output {
    pub format: Format,
    pool: DescriptorPool,
}

/// A message that people list.
pub trait Row: Message {
    /// Full name of its protobuf type.
    const TYPE: &'static str;
    const HEADERS: &'static [&'static str];
    fn cells(&self) -> Vec<String>;
    fn resource_name(&self) -> String;
}

impl Output {
    pub fn new(format: Format) -> Self {
        let pool = DescriptorPool::decode(FILE_DESCRIPTOR_SET).unwrap_or_default();
        Self { format, pool }
    }

    /// Protobuf's JSON mapping of a message.
    pub fn json(&self, type_name: &str, message: &impl Message) -> Result<Json, Failure> {
        let failed = |error: String| Failure::Failed(format!("write {type_name} as JSON: {error}"));
        let descriptor = self.pool.get_message_by_name(type_name).ok_or_else(|| failed("unknown type".into()))?;
        let dynamic = DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice());
        Ok(Json(dynamic.map_err(|error| failed(error.to_string()))?))
    }

    /// A list.
    pub fn list<R: Row>(&self, rows: &[R]) -> Result<(), Failure> {
        match self.format {
            Format::Table => {
                let mut table = Table::new(R::HEADERS);
                rows.iter().for_each(|row| table.push(row.cells()));
                write(&table.to_string())
            }
            Format::Name => {
                let names: String = rows.iter().map(|row| row.resource_name() + "\n").collect();
                write(&names)
            }
            Format::Jsonl => rows.iter().try_for_each(|row| self.line(R::TYPE, row)),
            Format::Json | Format::Yaml => {
                let values = rows.iter().map(|row| self.json(R::TYPE, row)).collect::<Result<Vec<_>, _>>()?;
                self.document(&values)
            }
        }
    }

    /// One thing; `details` is its table form.
    pub fn one<R: Row>(&self, row: &R, details: impl FnOnce() -> String) -> Result<(), Failure> {
        match self.format {
            Format::Table => write(&details()),
            Format::Name => write(&(row.resource_name() + "\n")),
            Format::Jsonl => self.line(R::TYPE, row),
            Format::Json | Format::Yaml => self.document(&self.json(R::TYPE, row)?),
        }
    }

    /// One object on a line of its own, at once.
    pub fn line(&self, type_name: &str, message: &impl Message) -> Result<(), Failure> {
        let line = serde_json::to_string(&self.json(type_name, message)?).map_err(unwritable)?;
        write(&(line + "\n"))
    }

    /// JSON or YAML.
    pub fn document(&self, value: &impl Serialize) -> Result<(), Failure> {
        write(&self.text(value)?)
    }

    /// One document in this format.
    pub fn text(&self, value: &impl Serialize) -> Result<String, Failure> {
        match self.format {
            Format::Yaml => serde_yaml_ng::to_string(value).map_err(unwritable),
            Format::Jsonl => Ok(serde_json::to_string(value).map_err(unwritable)? + "\n"),
            _ => Ok(serde_json::to_string_pretty(value).map_err(unwritable)? + "\n"),
        }
    }
}

pub fn unwritable(error: impl std::fmt::Display) -> Failure {
    Failure::Failed(format!("write output: {error}"))
}

/// A reader that went away (`| head`) ends the program quietly.
pub fn write(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        result => result.map_err(Failure::io("write to stdout")),
    }
}
