//! Generic SR-IOV NICs: sysfs, netlink, devlink and tc flower.
