//! Bugs of the network processor.

use std::sync::atomic::Ordering;

use async_trait::async_trait;
use dpumesh_core::offload::{
    Connection, ConnectionState, ConnectionToken, OffloadStats, Program, ProgramInfo, Slot, TableEntry,
    TableId, TableInfo, TableWrite,
};
use dpumesh_core::{Error, ErrorKind, Fence, NpOffload, Result};

use super::mutant::{Bug, Part};

#[async_trait]
impl NpOffload for Part {
    async fn programs(&self) -> Result<Vec<ProgramInfo>> {
        self.inner_offload().programs().await
    }

    async fn load(&self, fence: Fence, slot: Slot, program: &Program) -> Result<ProgramInfo> {
        self.inner_offload().load(self.fence(fence), slot, program).await
    }

    async fn activate(&self, fence: Fence, slot: Slot) -> Result<()> {
        let before = self.calls.fetch_add(1, Ordering::Relaxed);
        if self.has(Bug::RunsTheOldProgram) && before > 0 {
            return Ok(());
        }
        self.inner_offload().activate(self.fence(fence), slot).await
    }

    async fn unload(&self, fence: Fence, slot: Slot) -> Result<()> {
        self.inner_offload().unload(self.fence(fence), slot).await
    }

    async fn tables(&self) -> Result<Vec<TableInfo>> {
        self.inner_offload().tables().await
    }

    async fn write(&self, fence: Fence, table: TableId, entries: &[TableWrite]) -> Result<Vec<Result<()>>> {
        let fence = self.fence(fence);
        if !self.has(Bug::StopsAtTheFirstBadEntry) {
            return self.inner_offload().write(fence, table, entries).await;
        }
        let mut results = Vec::new();
        for entry in entries.chunks(1) {
            if results.iter().any(Result::is_err) {
                results.push(Err(Error::new(ErrorKind::Busy, "offload.write", "not tried")));
            } else {
                results.extend(self.inner_offload().write(fence, table, entry).await?);
            }
        }
        Ok(results)
    }

    async fn read(&self, table: TableId) -> Result<Vec<TableEntry>> {
        let mut entries = self.inner_offload().read(table).await?;
        if self.has(Bug::ReadsInReverse) {
            entries.reverse();
        }
        Ok(entries)
    }

    async fn offload_connection(&self, fence: Fence, connection: &Connection) -> Result<ConnectionToken> {
        let fence = self.fence(fence);
        self.inner_offload().offload_connection(fence, connection).await
    }

    async fn resume(&self, fence: Fence, token: ConnectionToken) -> Result<ConnectionState> {
        let answer = self.inner_offload().resume(self.fence(fence), token).await;
        let mut resumed = self.resumed.lock().expect("no panic under the lock");
        match answer {
            Ok(state) => Ok(resumed.insert(state).clone()),
            Err(error) => match resumed.clone().filter(|_| self.has(Bug::ResumesATokenTwice)) {
                Some(state) => Ok(state),
                None => Err(error),
            },
        }
    }

    async fn stats(&self) -> Result<OffloadStats> {
        self.inner_offload().stats().await
    }
}
