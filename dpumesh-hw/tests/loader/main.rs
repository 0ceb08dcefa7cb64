//! The C interface: in-tree backends behind it, libraries that break it, one in plain C, and the header.

mod behind;
mod broken;
mod header;
mod plain_c;

use std::time::Duration;

/// Deadline of a kit's case.
const DEADLINE: Duration = Duration::from_secs(10);
