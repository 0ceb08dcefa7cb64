//! [`Settings`]: what kind of card is simulated, as `key=value` lines that the profile of `open` carries.

use dpumesh_yusur::table::{self, Limits};

/// What kind of card it is, and how it misbehaves.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its limits in mode `dpu`.
    pub limits: Limits,
    /// Mode that it starts in.
    pub mode: u32,
    /// Version of its firmware.
    pub firmware: String,
    /// How long adding an entry takes, in microseconds.
    pub insert_us: u64,
    /// How long a reset takes at least, in milliseconds: `restore` waits for it.
    pub reset_ms: u64,
    /// 1: `open` refuses the firmware itself.
    pub refuse_firmware: bool,
}

impl Default for Settings {
    /// Exact keys only, few priorities, scarce counters, no connection tracking.
    fn default() -> Self {
        let actions = table::STEP_DROP..=table::STEP_METER;
        Self {
            limits: Limits {
                size: size_of::<Limits>() as u32,
                groups: 4,
                priorities: 4,
                profiles: 8,
                fields: (table::FIELD_L4_DST << 1) - 1,
                steps: actions.fold(0, |steps, step| steps | 1 << step),
                entries: 4096,
                tables: 128,
                counters: 256,
                counter_age_ms: 0,
                meters: 16,
                tunnels: 64,
                batch_max: 256,
                ageing: 1,
                slots: 2,
                program_tables: 8,
                connection_kinds: table::CONNECTION_SPLICE,
                max_image: 1 << 20,
                program_entries: 4096,
                connections: 256,
            },
            mode: table::MODE_DPU,
            firmware: "2.1.0".to_owned(),
            insert_us: 0,
            reset_ms: 0,
            refuse_firmware: false,
        }
    }
}

impl Settings {
    /// Reads `key=value` pairs, separated by commas or spaces.
    ///
    /// # Errors
    /// The first pair that has no meaning.
    pub fn read(text: &str) -> Result<Self, String> {
        let mut settings = Self::default();
        let mut pairs = text.split([',', ' ', '\n']).filter(|pair| !pair.is_empty());
        pairs.try_for_each(|pair| settings.set(pair))?;
        Ok(settings)
    }

    /// Changes one setting.
    ///
    /// # Errors
    /// The pair, when it has no meaning.
    pub fn set(&mut self, pair: &str) -> Result<(), String> {
        let Some((key, value)) = pair.split_once('=') else {
            return Err(format!("`{pair}` is no key=value"));
        };
        if key == "firmware" {
            value.clone_into(&mut self.firmware);
            return Ok(());
        }
        let number: u64 = value.parse().map_err(|_| format!("`{pair}`: no number"))?;
        let small = number.min(u32::MAX.into()) as u32;
        let limits = &mut self.limits;
        match key {
            "groups" => limits.groups = small,
            "priorities" => limits.priorities = small,
            "profiles" => limits.profiles = small,
            "fields" => limits.fields = number,
            "steps" => limits.steps = number,
            "entries" => limits.entries = number,
            "tables" => limits.tables = small,
            "counters" => limits.counters = small,
            "meters" => limits.meters = small,
            "tunnels" => limits.tunnels = small,
            "batch_max" => limits.batch_max = small,
            "ageing" => limits.ageing = small,
            "slots" => limits.slots = small,
            "connections" => limits.connections = number,
            "program_entries" => limits.program_entries = number,
            "mode" => self.mode = small,
            "insert_us" => self.insert_us = number,
            "reset_ms" => self.reset_ms = number,
            "refuse_firmware" => self.refuse_firmware = number != 0,
            _ => return Err(format!("`{key}` is no setting of the simulator")),
        }
        Ok(())
    }

    /// The limits in a mode.
    pub fn limits_in(&self, mode: u32) -> Limits {
        let mut limits = self.limits;
        if mode != table::MODE_DPU {
            limits.slots = 0;
            limits.program_tables = 0;
            limits.program_entries = 0;
            limits.max_image = 0;
            limits.connections = 0;
            limits.connection_kinds = 0;
        }
        if mode == table::MODE_LEGACY {
            limits = Limits {
                size: limits.size,
                batch_max: limits.batch_max,
                ..Limits::default()
            };
        }
        limits
    }
}
