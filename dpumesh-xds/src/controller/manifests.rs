//! What the cluster must give the controller: its role and its webhook, as YAML to apply.

use k8s_openapi::ByteString;

/// Where the API server finds the webhook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WebhookPlace {
    /// A Service in the cluster.
    Service {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
        /// Its port.
        port: u16,
    },
    /// `https://host:port`, without a path.
    Url(String),
}

/// The account, the role with exactly the verbs that are used, and the binding of both.
pub fn rbac(namespace: &str) -> String {
    format!(
        "\
apiVersion: v1
kind: ServiceAccount
metadata:
  name: istio-dpu-controller
  namespace: {namespace}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: istio-dpu-controller
rules:
# It reads and never writes: the webhook answers the API server, which writes by itself.
- apiGroups: [\"\"]
  resources: [namespaces, nodes, pods, services]
  verbs: [list, watch]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: istio-dpu-controller
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: istio-dpu-controller
subjects:
- kind: ServiceAccount
  name: istio-dpu-controller
  namespace: {namespace}
"
    )
}

/// The registration of both paths of the webhook; `authority` is PEM of what its certificate comes from.
pub fn webhook_configuration(place: &WebhookPlace, namespace: &str, authority: &str) -> String {
    let authority = serde_json::to_value(ByteString(authority.as_bytes().to_vec()));
    let authority = authority
        .ok()
        .and_then(|value| value.as_str().map(str::to_owned))
        .unwrap_or_default();
    let client = |path: &str| match place {
        WebhookPlace::Url(url) => format!("url: {}{path}", url.trim_end_matches('/')),
        WebhookPlace::Service {
            namespace,
            name,
            port,
        } => format!(
            "service:\n      namespace: {namespace}\n      name: {name}\n      port: {port}\n      path: {path}"
        ),
    };
    let (pods, namespaces) = (client("/mutate"), client("/mutate/namespace"));
    format!(
        "\
# failurePolicy Fail: without these labels an opted-in pod would get a sidecar beside the card, or would not be governed at all
# although its namespace is opted in. The selectors keep everybody else's pods out of this: while no controller answers, only opted-in
# pods cannot be created. The controller's own namespace is left out, or it could not come back.
# The API server asks webhooks in the order of their configurations' names: this one must stand before istio-sidecar-injector.
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingWebhookConfiguration
metadata:
  name: dpumesh
webhooks:
- name: pods.dpumesh.io
  admissionReviewVersions: [v1]
  sideEffects: None
  failurePolicy: Fail
  timeoutSeconds: 5
  clientConfig:
    {pods}
    caBundle: {authority}
  rules:
  - operations: [CREATE]
    apiGroups: [\"\"]
    apiVersions: [v1]
    resources: [pods]
    scope: Namespaced
  namespaceSelector:
    matchExpressions:
    - {{key: kubernetes.io/metadata.name, operator: NotIn, values: [kube-system, {namespace}]}}
  objectSelector:
    matchLabels:
      dpumesh.io/dataplane: dpu
- name: namespaces.dpumesh.io
  admissionReviewVersions: [v1]
  sideEffects: None
  failurePolicy: Fail
  timeoutSeconds: 5
  clientConfig:
    {namespaces}
    caBundle: {authority}
  rules:
  - operations: [CREATE]
    apiGroups: [\"\"]
    apiVersions: [v1]
    resources: [pods]
    scope: Namespaced
  namespaceSelector:
    matchLabels:
      dpumesh.io/dataplane: dpu
    matchExpressions:
    - {{key: kubernetes.io/metadata.name, operator: NotIn, values: [kube-system, {namespace}]}}
  objectSelector:
    matchExpressions:
    - {{key: dpumesh.io/dataplane, operator: DoesNotExist}}
"
    )
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
    use k8s_openapi::api::rbac::v1::ClusterRole;

    use super::*;

    #[test]
    fn the_role_has_the_verbs_that_are_used() {
        let text = rbac("dpumesh-system");
        let role = text.split("---\n").nth(1).unwrap();
        let role: ClusterRole = serde_saphyr::from_str(role).unwrap();
        let rules = role.rules.unwrap();
        assert_eq!(rules.len(), 1);
        assert_eq!(rules[0].verbs, ["list", "watch"]);
        assert_eq!(
            rules[0].resources.as_ref().unwrap(),
            &["namespaces", "nodes", "pods", "services"]
        );
    }

    #[test]
    fn the_registration_is_what_the_api_reads() {
        let place = WebhookPlace::Url("https://127.0.0.1:9443/".to_owned());
        let text = webhook_configuration(&place, "dpumesh-system", "PEM");
        let read: MutatingWebhookConfiguration = serde_saphyr::from_str(&text).unwrap();
        assert!(read.metadata.name.unwrap().as_str() < "istio-sidecar-injector");
        let webhooks = read.webhooks.unwrap();
        let urls: Vec<_> = webhooks
            .iter()
            .map(|webhook| webhook.client_config.url.as_deref().unwrap())
            .collect();
        assert_eq!(
            urls,
            [
                "https://127.0.0.1:9443/mutate",
                "https://127.0.0.1:9443/mutate/namespace"
            ]
        );
        for webhook in &webhooks {
            assert_eq!(webhook.failure_policy.as_deref(), Some("Fail"));
            assert_eq!(webhook.client_config.ca_bundle.as_ref().unwrap().0, b"PEM");
        }
        let service = WebhookPlace::Service {
            namespace: "dpumesh-system".into(),
            name: "istio-dpu-controller".into(),
            port: 443,
        };
        let text = webhook_configuration(&service, "dpumesh-system", "PEM");
        let read: MutatingWebhookConfiguration = serde_saphyr::from_str(&text).unwrap();
        let service = read.webhooks.unwrap().remove(1).client_config.service.unwrap();
        assert_eq!(
            (service.path.as_deref(), service.port),
            (Some("/mutate/namespace"), Some(443))
        );
    }
}
