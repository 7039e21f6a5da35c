//! `tenant`: quotas, and what is used of them.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use warren_proto::v1::{GetTenantRequest, ListTenantsRequest, Quota, SetQuotaRequest, Tenant};

use crate::client::{Client, PAGE_SIZE, tenants, within};
use crate::failure::Failure;
use crate::names;
use crate::output::{Output, Row};
use crate::table::{bytes, cpu, details, last_segment, of};

#[derive(Debug, Subcommand)]
pub enum TenantCommand {
    /// List the tenants
    List,
    /// Show one tenant; `-` shows the quota of those that have none of their own
    Show {
        /// Id or full name
        tenant: String,
    },
    /// Replace a tenant's quota; what is not named is not limited
    SetQuota(SetQuotaArgs),
}

#[derive(Debug, Args)]
pub struct SetQuotaArgs {
    /// Id or full name; `-`: all that have none of their own
    tenant: String,
    /// vCPU, such as 64
    #[arg(long, value_parser = names::cpu)]
    cpu: Option<i64>,
    /// Memory, such as 256GiB
    #[arg(long, value_parser = names::size)]
    memory: Option<i64>,
    /// Disk, such as 1TiB
    #[arg(long, value_parser = names::size)]
    disk: Option<i64>,
    /// GPU devices
    #[arg(long)]
    gpus: Option<i64>,
    /// Sandboxes that have not ended
    #[arg(long)]
    sandboxes: Option<i64>,
    /// Creates a minute, on average
    #[arg(long)]
    creates_per_minute: Option<i64>,
    /// Take the tenant's own quota back: the default holds for it again
    #[arg(long, conflicts_with_all = ["cpu", "memory", "disk", "gpus", "sandboxes", "creates_per_minute"])]
    none: bool,
}

pub async fn run(client: &Client, output: &Output, command: TenantCommand) -> Result<ExitCode, Failure> {
    match command {
        TenantCommand::List => output.list(&all(client).await?)?,
        TenantCommand::Show { tenant } => {
            let request = GetTenantRequest { name: names::in_collection("tenants", &tenant) };
            let get = |c| {
                let request = within(request.clone());
                async move { tenants(c).get_tenant(request).await }
            };
            let tenant = client.call(get).await?;
            output.one(&tenant, || tenant_details(&tenant))?;
        }
        TenantCommand::SetQuota(args) => {
            let quota = Quota {
                cpu_milli: args.cpu,
                memory_bytes: args.memory,
                disk_bytes: args.disk,
                gpus: args.gpus,
                sandboxes: args.sandboxes,
                creates_per_minute: args.creates_per_minute,
            };
            let name = names::in_collection("tenants", &args.tenant);
            let request = SetQuotaRequest { name, quota: (!args.none).then_some(quota) };
            let set = |c| {
                let request = within(request.clone());
                async move { tenants(c).set_quota(request).await }
            };
            let tenant = client.call(set).await?;
            output.one(&tenant, || tenant_details(&tenant))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub async fn all(client: &Client) -> Result<Vec<Tenant>, Failure> {
    let mut all = Vec::new();
    let mut page_token = String::new();
    loop {
        let list = |c| {
            let request = client.reading(ListTenantsRequest { page_size: PAGE_SIZE, page_token: page_token.clone() });
            async move { tenants(c).list_tenants(request).await }
        };
        let page = client.call(list).await?;
        all.extend(page.tenants);
        if page.next_page_token.is_empty() {
            return Ok(all);
        }
        page_token = page.next_page_token;
    }
}

/// `used / limit`, and the limit alone where nothing limits.
fn against(used: i64, limit: Option<i64>, show: fn(i64) -> String) -> String {
    of(show(used), limit.map_or("no limit".to_owned(), show))
}

fn count(number: i64) -> String {
    number.to_string()
}

impl Row for Tenant {
    const TYPE: &'static str = "warren.v1.Tenant";
    const HEADERS: &'static [&'static str] = &["TENANT", "SANDBOXES", "CPU", "MEMORY", "DISK", "GPUS", "QUOTA"];

    fn cells(&self) -> Vec<String> {
        let (used, quota) = (self.usage.unwrap_or_default(), self.quota.unwrap_or_default());
        vec![
            last_segment(&self.name),
            against(used.sandboxes, quota.sandboxes, count),
            against(used.cpu_milli, quota.cpu_milli, cpu),
            against(used.memory_bytes, quota.memory_bytes, bytes),
            against(used.disk_bytes, quota.disk_bytes, bytes),
            against(used.gpus, quota.gpus, count),
            if self.own_quota { "own" } else { "default" }.to_owned(),
        ]
    }

    fn resource_name(&self) -> String {
        self.name.clone()
    }
}

fn tenant_details(tenant: &Tenant) -> String {
    let cells = tenant.cells();
    let rate = tenant.quota.and_then(|quota| quota.creates_per_minute);
    details(&[
        ("Name", tenant.name.clone()),
        ("Sandboxes", cells[1].clone()),
        ("CPU", cells[2].clone()),
        ("Memory", cells[3].clone()),
        ("Disk", cells[4].clone()),
        ("GPUs", cells[5].clone()),
        ("Creates a minute", rate.map_or("no limit".to_owned(), count)),
        ("Quota", cells[6].clone()),
    ])
}
