//! Devices as NVIDIA's management library tells them. It is loaded at run time: a host without it has no such devices.

use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device as NvmlDevice, Nvml};
use warren_proto::units::Bytes;

use super::{Device, GpuError, Sharing};

/// The kind under which `nvidia-ctk cdi generate` describes devices.
const KIND: &str = "nvidia.com/gpu";

/// All of this host: of a device in MIG mode its instances, of any other the device.
pub fn devices() -> Result<Vec<Device>, GpuError> {
    let nvml = match Nvml::init() {
        Ok(nvml) => nvml,
        Err(NvmlError::LibloadingError(_) | NvmlError::LibraryNotFound | NvmlError::DriverNotLoaded) => {
            return Ok(Vec::new());
        }
        Err(error) => return Err(failed(error)),
    };
    let mut found = Vec::new();
    for index in 0..nvml.device_count().map_err(failed)? {
        let device = nvml.device_by_index(index).map_err(failed)?;
        if is_divided(&device) {
            found.extend(instances(&device, index)?);
        } else {
            found.push(describe(&device, &index.to_string(), Sharing::Advisory)?);
        }
    }
    Ok(found)
}

/// Devices without MIG say that they do not know the question.
fn is_divided(device: &NvmlDevice<'_>) -> bool {
    device.mig_mode().is_ok_and(|mode| mode.current != 0)
}

fn instances(parent: &NvmlDevice<'_>, parent_index: u32) -> Result<Vec<Device>, GpuError> {
    let mut found = Vec::new();
    for index in 0..parent.mig_device_count().map_err(failed)? {
        match parent.mig_device_by_index(index) {
            Ok(instance) => {
                found.push(describe(&instance, &format!("{parent_index}:{index}"), Sharing::Enforced)?);
            }
            // The count is the most that there could be: not every place is taken.
            Err(NvmlError::NotFound) => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(found)
}

fn describe(device: &NvmlDevice<'_>, index: &str, sharing: Sharing) -> Result<Device, GpuError> {
    let uuid = device.uuid().map_err(failed)?;
    let cdi = [&uuid, index].map(|name| format!("{KIND}={name}")).into();
    let memory = Bytes(device.memory_info().map_err(failed)?.total);
    Ok(Device { model: device.name().map_err(failed)?, memory, sharing, cdi, uuid })
}

fn failed(error: NvmlError) -> GpuError {
    GpuError::Nvml(error.to_string())
}

#[cfg(test)]
mod tests {
    /// Real devices where there are some; none, and no error, elsewhere.
    #[test]
    fn this_host_can_be_asked() {
        let devices = super::devices().expect("asked");
        if devices.is_empty() {
            println!("skipped: this host has no NVIDIA device");
        }
        for device in devices {
            assert!(device.uuid.starts_with("GPU-") || device.uuid.starts_with("MIG-"), "{device:?}");
            assert!(device.memory.0 > 0 && !device.model.is_empty(), "{device:?}");
        }
    }
}
