//! Tokens with which the adapter speaks for a pod: audience `istio-ca`, of the pod's account, bound to the pod.
//!
//! From files that a list names, or from the Kubernetes API (`TokenRequest`): the node's own restricted credential may ask that for
//! pods of its node and no others. A token is used until four fifths of its life.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;

use super::pods::LocalPod;
use crate::client::TokenSource;

/// Makes tokens for pods.
#[async_trait]
pub trait Tokens: fmt::Debug + Send + Sync {
    /// A token for `pod` that is good now; `None`: none is needed, the connection speaks for it.
    ///
    /// # Errors
    /// Why there is none. Worth another attempt later.
    async fn token(&self, pod: &LocalPod) -> Result<Option<String>, String>;
}

/// Tokens from the files that a list of pods names.
#[derive(Debug, Clone, Copy, Default)]
pub struct Files;

#[async_trait]
impl Tokens for Files {
    async fn token(&self, pod: &LocalPod) -> Result<Option<String>, String> {
        let Some(path) = &pod.token else { return Ok(None) };
        match tokio::fs::read_to_string(path).await {
            Ok(text) => Ok(Some(text.trim().to_owned())),
            Err(error) => Err(format!("{}: {error}", path.display())),
        }
    }
}

/// One pod's token, for its stream.
#[derive(Debug)]
pub(super) struct OfPod {
    pub(super) tokens: Arc<dyn Tokens>,
    pub(super) pod: LocalPod,
}

#[async_trait]
impl TokenSource for OfPod {
    async fn token(&self) -> Result<Option<String>, String> {
        self.tokens.token(&self.pod).await
    }
}

#[cfg(feature = "kube")]
pub use requested::Requested;

#[cfg(feature = "kube")]
mod requested {
    use std::collections::BTreeMap;
    use std::sync::Mutex;
    use std::sync::PoisonError;
    use std::time::{Duration, Instant};

    use async_trait::async_trait;
    use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
    use k8s_openapi::api::core::v1::ServiceAccount;
    use kube::api::{Api, PostParams};

    use super::{Files, LocalPod, Tokens};

    /// What istiod and its CA accept.
    const AUDIENCE: &str = "istio-ca";

    /// Seconds asked for; the API may give less.
    const LIFETIME: i64 = 3600;

    /// Tokens asked of the Kubernetes API; pods that name a file have theirs from it.
    #[derive(Clone)]
    pub struct Requested {
        client: kube::Client,
        /// By uid: until when it is used.
        known: std::sync::Arc<Mutex<BTreeMap<String, (Instant, String)>>>,
    }

    impl std::fmt::Debug for Requested {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("Requested")
        }
    }

    impl Requested {
        /// With this client's rights.
        pub fn new(client: kube::Client) -> Self {
            Self {
                client,
                known: std::sync::Arc::default(),
            }
        }

        fn known(&self, uid: &str) -> Option<String> {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.retain(|_, (until, _)| Instant::now() < *until);
            known.get(uid).map(|(_, token)| token.clone())
        }
    }

    #[async_trait]
    impl Tokens for Requested {
        async fn token(&self, pod: &LocalPod) -> Result<Option<String>, String> {
            if pod.token.is_some() {
                return Files.token(pod).await;
            }
            if let Some(token) = self.known(&pod.uid) {
                return Ok(Some(token));
            }
            let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), &pod.namespace);
            let request = TokenRequest {
                spec: TokenRequestSpec {
                    audiences: vec![AUDIENCE.to_owned()],
                    expiration_seconds: Some(LIFETIME),
                    bound_object_ref: Some(BoundObjectReference {
                        api_version: Some("v1".to_owned()),
                        kind: Some("Pod".to_owned()),
                        name: Some(pod.name.clone()),
                        uid: Some(pod.uid.clone()),
                    }),
                },
                ..TokenRequest::default()
            };
            let status = accounts
                .create_token_request(&pod.service_account, &PostParams::default(), &request)
                .await
                .map_err(|error| format!("TokenRequest for {}: {error}", pod.key()))?
                .status
                .ok_or_else(|| format!("TokenRequest for {}: an answer without a token", pod.key()))?;
            let until = Instant::now() + Duration::from_secs(LIFETIME as u64).mul_f64(0.8);
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.insert(pod.uid.clone(), (until, status.token.clone()));
            Ok(Some(status.token))
        }
    }
}
