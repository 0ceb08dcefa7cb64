//! Checks of [`NpOffload`].

use async_trait::async_trait;
use dpumesh_core::offload::{
    Connection, ConnectionState, ConnectionToken, NpOffload, OffloadStats, Program, ProgramInfo,
    ProgramState, Slot, TableEntry, TableId, TableInfo, TableWrite,
};
use dpumesh_core::{BackendExt, Error, Fence, Result};

use super::Checked;

#[async_trait]
impl NpOffload for Checked {
    async fn programs(&self) -> Result<Vec<ProgramInfo>> {
        let look = self.reading("offload.programs");
        let programs = look.general(self.inner.require_offload()?.programs().await)?;
        look.ascending(programs.iter().map(|program| program.slot))?;
        let running = programs.iter().filter(|p| p.state == ProgramState::Running);
        look.hold(running.count() <= 1, || "two programs run at a time")?;
        for info in &programs {
            let is_empty = info.state == ProgramState::Empty;
            look.hold(is_empty == info.program.is_none(), || {
                format!(
                    "slot {} is {:?} and holds {:?}",
                    info.slot.0, info.state, info.program
                )
            })?;
        }
        Ok(programs)
    }

    async fn load(&self, fence: Fence, slot: Slot, program: &Program) -> Result<ProgramInfo> {
        let look = self.fenced("offload.load", fence);
        let info = look.general(self.inner.require_offload()?.load(fence, slot, program).await)?;
        let hash = info.program.as_ref().map(|(_, _, hash)| hash);
        look.hold(
            info.slot == slot && hash == Some(&program.hash),
            || "what is loaded is not what was given",
        )?;
        Ok(info)
    }

    async fn activate(&self, fence: Fence, slot: Slot) -> Result<()> {
        let look = self.fenced("offload.activate", fence);
        look.general(self.inner.require_offload()?.activate(fence, slot).await)
    }

    async fn unload(&self, fence: Fence, slot: Slot) -> Result<()> {
        let look = self.fenced("offload.unload", fence);
        look.general(self.inner.require_offload()?.unload(fence, slot).await)
    }

    async fn tables(&self) -> Result<Vec<TableInfo>> {
        let look = self.reading("offload.tables");
        let tables = look.general(self.inner.require_offload()?.tables().await)?;
        for table in &tables {
            look.hold(table.used <= table.capacity, || {
                format!(
                    "{} of {} entries in use at {}",
                    table.used, table.capacity, table.name
                )
            })?;
        }
        Ok(tables)
    }

    async fn write(
        &self,
        fence: Fence,
        table: TableId,
        entries: &[TableWrite],
    ) -> Result<Vec<Result<(), Error>>> {
        let look = self.fenced("offload.write", fence);
        let results = look.general(self.inner.require_offload()?.write(fence, table, entries).await)?;
        look.count("results", entries.len(), results.len())?;
        let checked = results
            .into_iter()
            .enumerate()
            .map(|(index, result)| result.map_err(|error| look.check_error(error).index(index)));
        Ok(checked.collect())
    }

    async fn read(&self, table: TableId) -> Result<Vec<TableEntry>> {
        let look = self.reading("offload.read");
        let entries = look.general(self.inner.require_offload()?.read(table).await)?;
        look.ascending(
            entries
                .iter()
                .map(|entry| (&entry.key, &entry.mask, entry.priority)),
        )?;
        Ok(entries)
    }

    async fn offload_connection(&self, fence: Fence, connection: &Connection) -> Result<ConnectionToken> {
        let look = self.fenced("offload.offload_connection", fence);
        let offload = self.inner.require_offload()?;
        look.general(offload.offload_connection(fence, connection).await)
    }

    async fn resume(&self, fence: Fence, token: ConnectionToken) -> Result<ConnectionState> {
        let look = self.fenced("offload.resume", fence);
        look.general(self.inner.require_offload()?.resume(fence, token).await)
    }

    async fn stats(&self) -> Result<OffloadStats> {
        let look = self.reading("offload.stats");
        let stats = look.general(self.inner.require_offload()?.stats().await)?;
        look.hold(
            stats.connections <= stats.connections_total,
            || "more connections are carried than ever were taken",
        )?;
        Ok(stats)
    }
}
