//! The drivers that this node offers, by name.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use anyhow::Context;

use crate::config::{Config, DriverKind};
use crate::driver::Driver;
use crate::driver::oci::{OciConfig, OciDriver};
use crate::driver::sim::{SimConfig, SimDriver};
use crate::fence::Switch;
use crate::gpu::Gpus;

/// At least one driver; the first is the default.
#[derive(Clone)]
pub struct Drivers {
    default: &'static str,
    by_name: BTreeMap<&'static str, Arc<dyn Driver>>,
}

impl Drivers {
    /// `None` where the list is empty.
    pub fn new(drivers: Vec<Arc<dyn Driver>>) -> Option<Self> {
        let default = drivers.first()?.name();
        let by_name = drivers.into_iter().map(|driver| (driver.name(), driver)).collect();
        Some(Self { default, by_name })
    }

    /// The driver of that name, or the default.
    pub fn get(&self, name: Option<&str>) -> Option<Arc<dyn Driver>> {
        self.by_name.get(name.unwrap_or(self.default)).cloned()
    }

    /// What an assignment asks for: a driver, or `<driver>/<runtime>`; `None`: the default.
    pub fn choose(&self, name: Option<&str>) -> Option<(Arc<dyn Driver>, Option<String>)> {
        match name.and_then(|name| name.split_once('/')) {
            None => Some((self.get(name)?, None)),
            Some((driver, runtime)) => {
                let driver = self.get(Some(driver))?;
                let offered = driver.runtimes().iter().any(|offered| offered == runtime);
                offered.then(|| (driver, Some(runtime.to_owned())))
            }
        }
    }

    pub fn all(&self) -> impl Iterator<Item = &Arc<dyn Driver>> {
        self.by_name.values()
    }

    /// What freezes fenced sandboxes; `None`: there is a driver that fences none.
    pub fn switches(&self) -> Option<Vec<Switch>> {
        self.all().map(|driver| driver.switch()).collect()
    }

    /// All that [`Drivers::choose`] takes, the default first: each driver, then the same with each of its runtimes.
    pub fn names(&self) -> Vec<String> {
        let others = self.by_name.keys().filter(|name| **name != self.default);
        let all = std::iter::once(&self.default).chain(others);
        let with_runtimes = |name: &&'static str| {
            let runtimes = self.by_name[*name].runtimes();
            let qualified = runtimes.iter().map(|runtime| format!("{name}/{runtime}")).collect::<Vec<_>>();
            std::iter::once((*name).to_owned()).chain(qualified).collect::<Vec<_>>()
        };
        all.flat_map(with_runtimes).collect()
    }
}

/// The drivers that a configuration names.
#[derive(Debug)]
pub struct Built {
    pub drivers: Drivers,
    /// For what only this driver can do.
    pub oci: Option<Arc<OciDriver>>,
    /// What can be injected.
    pub gpus: Arc<Gpus>,
}

/// Makes the drivers and checks that they can work on this host.
pub async fn build(config: &Config) -> anyhow::Result<Built> {
    let mut list: Vec<Arc<dyn Driver>> = Vec::new();
    let mut oci = None;
    let gpus = discover_gpus(config).await?;
    for kind in &config.drivers {
        match kind {
            DriverKind::Oci => {
                let driver = Arc::new(build_oci(config, Arc::clone(&gpus)).await.context("driver oci")?);
                list.push(Arc::clone(&driver) as Arc<dyn Driver>);
                oci = Some(driver);
            }
            DriverKind::Sim => {
                let switch = std::path::absolute(&config.data_dir)?.join("fence/sim");
                list.push(Arc::new(SimDriver::new(SimConfig { switch: Some(switch), ..SimConfig::default() })));
            }
        }
    }
    let drivers = Drivers::new(list).context("no driver is configured")?;
    Ok(Built { drivers, oci, gpus })
}

/// Only driver `oci` injects devices.
async fn discover_gpus(config: &Config) -> anyhow::Result<Arc<Gpus>> {
    if !config.drivers.contains(&DriverKind::Oci) {
        return Ok(Arc::default());
    }
    let config = config.gpus.clone();
    let gpus = tokio::task::spawn_blocking(move || Gpus::discover(&config)).await?.context("list the GPUs")?;
    Ok(Arc::new(gpus))
}

async fn build_oci(config: &Config, gpus: Arc<Gpus>) -> anyhow::Result<OciDriver> {
    let config = OciConfig {
        runtime: config.runtime.clone(),
        data_dir: config.data_dir.clone(),
        node_id: config.node_id.clone(),
        gpus,
        network: config.network.clone(),
        shim_exe: std::env::current_exe().context("find this program's own file")?,
    };
    // It runs the runtime once, and waits for it.
    Ok(tokio::task::spawn_blocking(move || OciDriver::new(config)).await??)
}

impl fmt::Debug for Drivers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.names()).finish()
    }
}
