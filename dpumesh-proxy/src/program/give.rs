//! What a newer process is given when it takes over.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::mpsc;

use super::{Shared, lock};
use crate::hand_over::{Give, Passed};
use crate::worker::{Command, ListenerKey};

/// What a newer process is given.
pub(super) struct Giver {
    pub(super) shared: Arc<Shared>,
    pub(super) workers: Vec<mpsc::UnboundedSender<Command>>,
    pub(super) admin: Option<TcpListener>,
}

impl Give for Giver {
    fn sockets(&self) -> Vec<Passed> {
        let (answer, answers) = std::sync::mpsc::channel();
        for worker in &self.workers {
            // A worker that is gone listens to nothing.
            let _ = worker.send(Command::Copy(answer.clone()));
        }
        drop(answer);
        let how = lock(&self.shared.bound).clone();
        let options = |key: &ListenerKey| how.get(key).map(|(_, options)| format!("{options:?}"));
        let listener = |(key, socket): (ListenerKey, TcpListener)| Passed {
            options: options(&key).unwrap_or_default(),
            listener: Some(key.0),
            address: key.1,
            socket,
        };
        let mut all: Vec<Passed> = answers.iter().flatten().map(listener).collect();
        let configured = self.shared.config.load().admin;
        let admin = self.admin.as_ref().and_then(|admin| admin.try_clone().ok());
        all.extend(configured.zip(admin).map(|(address, socket)| Passed {
            listener: None,
            address,
            options: String::new(),
            socket,
        }));
        all
    }

    fn handed_over(&self) {
        self.shared.handed_over.store(true, Ordering::Release);
        self.shared.quit();
    }
}
