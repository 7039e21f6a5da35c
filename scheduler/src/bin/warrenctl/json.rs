//! Messages as JSON and YAML have them: protobuf's own mapping (lowerCamelCase keys, enums by full name, times by RFC 3339,
//! bytes in base64), made easier on scripts.
//!
//! 64-bit integers are plain numbers; fields that are zero or empty are written too, messages that are not set are not. The
//! same message is always the same text: keys stand in the order of the `.proto` files, maps by key.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use prost_reflect::{DynamicMessage, Kind, MapKey, ReflectMessage, SerializeOptions, Value};
use serde::ser::{Serialize, SerializeMap, Serializer};

/// Package of the messages that have texts of their own, such as `Timestamp`.
const WELL_KNOWN: &str = "google.protobuf";

/// A message.
#[derive(Debug)]
pub struct Json(pub DynamicMessage);

impl Serialize for Json {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serialize_message(&self.0, serializer)
    }
}

fn serialize_message<S: Serializer>(message: &DynamicMessage, serializer: S) -> Result<S::Ok, S::Error> {
    let descriptor = message.descriptor();
    if descriptor.package_name() == WELL_KNOWN {
        return message.serialize_with_options(serializer, &SerializeOptions::new());
    }
    let mut map = serializer.serialize_map(None)?;
    for field in descriptor.fields().filter(|field| !field.supports_presence() || message.has_field(field)) {
        let value = message.get_field(&field);
        map.serialize_entry(field.json_name(), &Shown { value: &value, kind: field.kind() })?;
    }
    map.end()
}

/// A value, of the type that its field has.
struct Shown<'a> {
    value: &'a Value,
    kind: Kind,
}

impl Serialize for Shown<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.value {
            Value::Message(message) => serialize_message(message, serializer),
            Value::List(items) => serializer.collect_seq(items.iter().map(|value| self.of(value))),
            Value::Map(entries) => {
                let sorted: BTreeMap<String, &Value> = entries.iter().map(|(key, value)| (text(key), value)).collect();
                let values = Kind::as_message(&self.kind).map(|entry| entry.map_entry_value_field().kind());
                let kind = values.unwrap_or(Kind::String);
                serializer.collect_map(sorted.iter().map(|(key, value)| (key, Shown { value, kind: kind.clone() })))
            }
            Value::EnumNumber(number) => match self.kind.as_enum().and_then(|kind| kind.get_value(*number)) {
                Some(value) => serializer.serialize_str(value.name()),
                // One that a newer server knows.
                None => serializer.serialize_i32(*number),
            },
            Value::Bytes(bytes) => serializer.serialize_str(&STANDARD.encode(bytes)),
            Value::String(text) => serializer.serialize_str(text),
            Value::Bool(value) => serializer.serialize_bool(*value),
            Value::I32(value) => serializer.serialize_i32(*value),
            Value::I64(value) => serializer.serialize_i64(*value),
            Value::U32(value) => serializer.serialize_u32(*value),
            Value::U64(value) => serializer.serialize_u64(*value),
            Value::F32(value) => serializer.serialize_f32(*value),
            Value::F64(value) => serializer.serialize_f64(*value),
        }
    }
}

impl Shown<'_> {
    fn of<'a>(&self, value: &'a Value) -> Shown<'a> {
        Shown { value, kind: self.kind.clone() }
    }
}

fn text(key: &MapKey) -> String {
    match key {
        MapKey::Bool(value) => value.to_string(),
        MapKey::I32(value) => value.to_string(),
        MapKey::I64(value) => value.to_string(),
        MapKey::U32(value) => value.to_string(),
        MapKey::U64(value) => value.to_string(),
        MapKey::String(value) => value.clone(),
    }
}
