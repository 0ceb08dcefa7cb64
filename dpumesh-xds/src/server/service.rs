//! The gRPC end: one task per stream between the transport and a [`Session`].

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::{Request, Response, Status, Streaming};
use tower_service::Service;

use super::session::Session;
use super::{Counters, Current, Event, Outcome};
use crate::discovery::{DELTA_CALL, DeltaDiscoveryRequest, DeltaDiscoveryResponse, SERVICE};

/// Responses on their way to one proxy's transport.
const RESPONSES: usize = 8;

/// The largest request read, in octets: a proxy that comes back names all it has.
const MAX_REQUEST: usize = 64 << 20;

/// Serves `AggregatedDiscoveryService/DeltaAggregatedResources`.
#[derive(Debug, Clone)]
pub struct AdsService {
    current: watch::Receiver<Option<Current>>,
    events: mpsc::Sender<Event>,
    counters: Arc<Counters>,
    only_for: Option<String>,
}

impl AdsService {
    pub(super) fn new(
        current: watch::Receiver<Option<Current>>,
        events: mpsc::Sender<Event>,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            current,
            events,
            counters,
            only_for: None,
        }
    }

    /// The same for one node alone: a stream whose node has another id is refused with both names.
    #[must_use]
    pub fn only_for(self, node: String) -> Self {
        Self {
            only_for: Some(node),
            ..self
        }
    }

    fn admit(&self, request: &DeltaDiscoveryRequest) -> Result<(), Status> {
        let (Some(expected), Some(node)) = (&self.only_for, &request.node) else {
            return Ok(());
        };
        if node.id == *expected {
            return Ok(());
        }
        let reason = format!(
            "the certificate is that of {expected}, the node's id is {:?}",
            node.id
        );
        tracing::warn!(reason, "xDS stream refused");
        Err(Status::permission_denied(reason))
    }
}

impl NamedService for AdsService {
    const NAME: &'static str = SERVICE;
}

type Answer<T> = Pin<Box<dyn Future<Output = T> + Send>>;

impl Service<http::Request<Body>> for AdsService {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Answer<Result<http::Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move {
            if request.uri().path() != DELTA_CALL {
                return Ok(Status::unimplemented("only delta ADS is served here").into_http());
            }
            let codec = tonic_prost::ProstCodec::<DeltaDiscoveryResponse, DeltaDiscoveryRequest>::default();
            let mut grpc = Grpc::new(codec).max_decoding_message_size(MAX_REQUEST);
            Ok(grpc.streaming(Delta(service), request).await)
        })
    }
}

/// The one method.
struct Delta(AdsService);

impl StreamingService<DeltaDiscoveryRequest> for Delta {
    type Response = DeltaDiscoveryResponse;
    type ResponseStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;
    type Future = Answer<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<DeltaDiscoveryRequest>>) -> Self::Future {
        let (sender, receiver) = mpsc::channel(RESPONSES);
        Counters::add(&self.0.counters.streams, 1);
        tokio::spawn(run(self.0.clone(), request.into_inner(), sender));
        Box::pin(async move { Ok(Response::new(ReceiverStream::new(receiver))) })
    }
}

async fn run(
    mut service: AdsService,
    mut requests: Streaming<DeltaDiscoveryRequest>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
) {
    let mut session = Session::default();
    let first = service.current.borrow_and_update().clone();
    first
        .into_iter()
        .for_each(|(generation, snapshot)| session.publish(generation, snapshot));
    loop {
        tokio::select! {
            request = requests.message() => match request {
                Ok(Some(request)) => {
                    if let Err(refusal) = service.admit(&request) {
                        let _ = responses.send(Err(refusal)).await;
                        break;
                    }
                    if let Err(error) = session.request(request) {
                        let _ = responses.send(Err(Status::invalid_argument(error.to_string()))).await;
                        break;
                    }
                }
                Ok(None) => break,
                Err(status) => {
                    tracing::debug!(%status, "xDS stream of a proxy broke");
                    break;
                }
            },
            changed = service.current.changed() => match changed {
                Ok(()) => {
                    let newest = service.current.borrow_and_update().clone();
                    newest.into_iter().for_each(|(generation, snapshot)| session.publish(generation, snapshot));
                }
                Err(_) => break,
            },
        }
        for response in session.responses() {
            Counters::add(&service.counters.responses, 1);
            Counters::add(&service.counters.resources, response.resources.len());
            if responses.send(Ok(response)).await.is_err() {
                break;
            }
        }
        service.tell(&mut session);
    }
    session.close();
    service.tell(&mut session);
}

impl AdsService {
    fn tell(&self, session: &mut Session) {
        for event in session.events.drain(..) {
            match event.outcome {
                Outcome::Ack => Counters::add(&self.counters.acks, 1),
                Outcome::Nack(_) => Counters::add(&self.counters.nacks, 1),
                Outcome::InStep | Outcome::Refused | Outcome::Gone => {}
            }
            if self.events.try_send(event).is_err() {
                Counters::add(&self.counters.events_lost, 1);
            }
        }
    }
}
