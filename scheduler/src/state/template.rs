//! What sandboxes start from.

use warren_proto::ids::TemplateId;

use super::command::{LogTime, RequestKey, TemplateSpec};
use super::outcome::{Rejected, Reply};
use super::{Context, State};
use std::sync::Arc;

/// Most templates of a region.
pub const MAX_TEMPLATES: u64 = 10_000;

/// A template. Immutable but for the count of its users.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    pub id: TemplateId,
    pub spec: TemplateSpec,
    pub created: LogTime,
    /// Sandboxes that name it, in any state.
    pub users: u64,
    /// Ledger index of its creation.
    pub revision: u64,
}

pub(super) fn create(
    state: &mut State,
    context: &Context,
    id: &TemplateId,
    spec: &TemplateSpec,
    request: Option<&RequestKey>,
) -> Result<Reply, Rejected> {
    if let Some(answer) = state.answered(&context.scope(None), request)? {
        return Ok(answer);
    }
    if let Some(existing) = state.templates.get(id) {
        if existing.spec != *spec {
            return Err(Rejected::TemplateExists(id.clone()));
        }
        let reply = Reply::Template(existing.clone());
        state.requests.remember(&context.scope(None), request, (state.log_time, state.level), &reply);
        return Ok(reply);
    }
    if state.templates.len() as u64 >= MAX_TEMPLATES {
        return Err(Rejected::LimitReached { what: "the table of templates", limit: MAX_TEMPLATES });
    }
    let template = Arc::new(Template {
        id: id.clone(),
        spec: spec.clone(),
        created: state.log_time,
        users: 0,
        revision: context.index,
    });
    let reply = Reply::Template(template.clone());
    state.requests.remember(&context.scope(None), request, (state.log_time, state.level), &reply);
    state.templates.insert(id.clone(), template);
    Ok(reply)
}

pub(super) fn delete(state: &mut State, id: &TemplateId) -> Result<Reply, Rejected> {
    let template = state.templates.get(id).ok_or_else(|| Rejected::TemplateNotFound(id.clone()))?;
    if template.users > 0 {
        return Err(Rejected::TemplateInUse { template: id.clone(), sandboxes: template.users });
    }
    state.templates.remove(id);
    Ok(Reply::Done)
}

/// Changes the count of users of a template that exists.
pub(super) fn count_user(state: &mut State, id: &TemplateId, change: i64) {
    if let Some(template) = state.templates.get_mut(id) {
        let template = Arc::make_mut(template);
        template.users = template.users.saturating_add_signed(change);
    }
}
