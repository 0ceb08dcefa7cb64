//! Bugs of the network processor.

use std::sync::atomic::Ordering;

use async_trait::async_trait;
use dpumesh_core::offload::{
    Connection, ConnectionState, ConnectionToken, OffloadStats, Program, ProgramInfo, ProgramState, Slot,
    TableEntry, TableId, TableInfo, TableKind, TableWrite,
};
use dpumesh_core::{Error, ErrorKind, Fence, NpOffload, Result};

use super::mutant::{Bug, Part};

#[async_trait]
impl NpOffload for Part {
    async fn programs(&self) -> Result<Vec<ProgramInfo>> {
        let mut programs = self.inner_offload().programs().await?;
        if self.has(Bug::StopsTheOldProgramOnAFault) && self.busy.load(Ordering::Relaxed) {
            for info in programs
                .iter_mut()
                .filter(|info| info.state == ProgramState::Running)
            {
                info.state = ProgramState::Loaded;
            }
        }
        Ok(programs)
    }

    async fn load(&self, fence: Fence, slot: Slot, program: &Program) -> Result<ProgramInfo> {
        self.inner_offload().load(self.fence(fence), slot, program).await
    }

    async fn activate(&self, fence: Fence, slot: Slot) -> Result<()> {
        let before = self.calls.fetch_add(1, Ordering::Relaxed);
        if self.has(Bug::RunsTheOldProgram) && before > 0 {
            return Ok(());
        }
        let answer = self.inner_offload().activate(self.fence(fence), slot).await;
        self.busy.store(answer.is_err(), Ordering::Relaxed);
        answer
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
        if self.has(Bug::ForgetsMeters) {
            let tables = self.inner_offload().tables().await?;
            let is_meter = |info: &TableInfo| info.id == table && info.kind == TableKind::Meter;
            if tables.iter().any(is_meter) {
                entries.clear();
            }
        }
        if self.has(Bug::ReadsInReverse) {
            entries.reverse();
        }
        Ok(entries)
    }

    async fn offload_connection(&self, fence: Fence, connection: &Connection) -> Result<ConnectionToken> {
        let fence = self.fence(fence);
        let token = self.inner_offload().offload_connection(fence, connection).await?;
        if self.has(Bug::ResumesWhatWasLost) {
            let state = ConnectionState {
                connection: connection.clone(),
                octets_up: 0,
                octets_down: 0,
            };
            *self.resumed.lock().expect("no panic under the lock") = Some(state);
        }
        Ok(token)
    }

    async fn resume(&self, fence: Fence, token: ConnectionToken) -> Result<ConnectionState> {
        let answer = self.inner_offload().resume(self.fence(fence), token).await;
        let mut resumed = self.resumed.lock().expect("no panic under the lock");
        match answer {
            Ok(mut state) => {
                if self.has(Bug::ForgetsWhatItPassed) {
                    (state.octets_up, state.octets_down) = (0, 0);
                }
                Ok(resumed.insert(state).clone())
            }
            Err(error) => match resumed
                .clone()
                .filter(|_| matches!(self.bug, Bug::ResumesATokenTwice | Bug::ResumesWhatWasLost))
            {
                Some(state) => Ok(state),
                None => Err(error),
            },
        }
    }

    async fn stats(&self) -> Result<OffloadStats> {
        let mut stats = self.inner_offload().stats().await?;
        if self.has(Bug::CountsNoConnections) {
            stats.connections_total = 0;
        }
        Ok(stats)
    }
}
