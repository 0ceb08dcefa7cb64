//! The sysfs tree of a fake card: written from the state of the machine, after each change that shows in it.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::abilities::VFIO;

use super::Model;
use super::machine::{FakePf, State};

/// Writes the tree anew: functions that are there, their drivers and numbers.
pub(super) fn write(root: &Path, model: &Model, state: &State) -> io::Result<()> {
    let devices = root.join("bus/pci/devices");
    if devices.exists() {
        fs::remove_dir_all(&devices)?;
    }
    fs::create_dir_all(&devices)?;
    for driver in [model.driver, model.vf_driver, VFIO] {
        fs::create_dir_all(root.join("bus/pci/drivers").join(driver))?;
    }
    if state.away {
        return Ok(());
    }
    for pf in &state.pfs {
        write_pf(&devices, model, pf)?;
    }
    Ok(())
}

fn write_pf(devices: &Path, model: &Model, pf: &FakePf) -> io::Result<()> {
    let dir = devices.join(pf.pci.to_string());
    fs::create_dir(&dir)?;
    identify(&dir, (model.id.0, model.id.1))?;
    fs::write(dir.join("sriov_totalvfs"), format!("{}\n", model.total_vfs))?;
    fs::write(dir.join("sriov_numvfs"), format!("{}\n", pf.vfs.len()))?;
    link_driver(&dir, Some(model.driver))?;
    for vf in &pf.vfs {
        symlink(
            format!("../{}", vf.pci),
            dir.join(format!("virtfn{}", vf.admin.index)),
        )?;
        let dir = devices.join(vf.pci.to_string());
        fs::create_dir(&dir)?;
        identify(&dir, (model.id.0, model.vf_id))?;
        fs::write(dir.join("driver_override"), "(null)\n")?;
        if model.flr {
            fs::write(dir.join("reset"), "")?;
        }
        symlink(format!("../{}", pf.pci), dir.join("physfn"))?;
        link_driver(&dir, vf.driver.as_deref())?;
    }
    Ok(())
}

fn identify(dir: &Path, (vendor, device): (u16, u16)) -> io::Result<()> {
    fs::write(dir.join("vendor"), format!("{vendor:#06x}\n"))?;
    fs::write(dir.join("device"), format!("{device:#06x}\n"))?;
    fs::write(dir.join("numa_node"), "0\n")
}

/// A function bound to another driver: only that link changes.
pub(super) fn link_driver(dir: &Path, driver: Option<&str>) -> io::Result<()> {
    let link = dir.join("driver");
    if link.symlink_metadata().is_ok() {
        fs::remove_file(&link)?;
    }
    match driver {
        Some(driver) => symlink(format!("../../drivers/{driver}"), link),
        None => Ok(()),
    }
}
