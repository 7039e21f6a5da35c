//! Who calls. Today every caller that gets through is an operator: plain text is served on loopback only, TLS with a client
//! certificate elsewhere. Roles and tenants come with authentication; every command carries its caller already.

use tonic::{Request, Status};
use warren_proto::ids::TenantId;

use super::status;
use crate::state::command::{Caller, Role};

/// The caller of a request.
pub fn of<T>(request: &Request<T>) -> Caller {
    let certificate = request.peer_certs().is_some_and(|certificates| !certificates.is_empty());
    let principal = if certificate { "certificate" } else { "local" };
    Caller { principal: principal.to_owned(), role: Role::Operator, tenant: None }
}

/// Refuses a caller that may not act for the region.
pub fn check_operator(caller: &Caller) -> Result<(), Status> {
    match caller.role {
        Role::System | Role::Operator => Ok(()),
        Role::Node | Role::Tenant => {
            Err(status::permission_denied(&format!("{} may not act for the region", caller.principal)))
        }
    }
}

/// Refuses a caller that may not act for `tenant`.
pub fn check_tenant(caller: &Caller, tenant: &TenantId) -> Result<(), Status> {
    if caller.role.may_act_for(caller.tenant.as_ref(), tenant) {
        Ok(())
    } else {
        Err(status::permission_denied(&format!("{} may not act for tenants/{tenant}", caller.principal)))
    }
}
