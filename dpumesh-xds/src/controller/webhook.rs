//! The admission webhook: labels of opted-in pods, as `admission.k8s.io/v1` asks for them.
//!
//! | path | asked about | what an opted-in pod gets |
//! |---|---|---|
//! | `/mutate` | pods with the label | `sidecar.istio.io/inject: "false"`, `security.istio.io/tlsMode: istio` |
//! | `/mutate/namespace` | pods of namespaces with the label | the same, and the label itself if it has none |
//!
//! The first label keeps Istio's injector away, the second makes istiod tell other proxies that this pod speaks mutual TLS: what an injected
//! sidecar has without asking. A pod that says something else of its own is overruled, with a warning to whoever creates it. A
//! pod on its node's network has no interface to give to a card and is left alone, with a warning as well. Nothing is ever denied.
//!
//! The answer is a JSON patch (RFC 6902); names in its paths are escaped by RFC 6901 §3.

use std::collections::BTreeMap;

use axum::Router;
use axum::body::Bytes;
use axum::extract::DefaultBodyLimit;
use axum::routing::post;
use http::StatusCode;
use k8s_openapi::ByteString;
use kube::core::admission::{AdmissionRequest, AdmissionResponse, AdmissionReview, Operation, PatchType};
use kube::core::{DynamicObject, ResourceExt};
use serde_json::{Value, json};

use super::{OPT_IN, OPTED_IN};

/// Largest request, octets: an object of the API has at most 1.5 MiB, and a request may carry two.
const LARGEST: usize = 4 << 20;

const INJECT: &str = "sidecar.istio.io/inject";
const TLS_MODE: &str = "security.istio.io/tlsMode";

/// Both paths.
pub(super) fn routes() -> Router {
    Router::new()
        .route("/mutate", post(|body| answer(body, false)))
        .route("/mutate/namespace", post(|body| answer(body, true)))
        .layer(DefaultBodyLimit::max(LARGEST))
}

async fn answer(body: Bytes, namespace: bool) -> (StatusCode, [(http::HeaderName, &'static str); 1], String) {
    let (status, kind, text) = match mutate(&body, namespace) {
        Ok(review) => (StatusCode::OK, "application/json", review),
        Err(reason) => {
            tracing::warn!(reason, "admission request refused");
            (StatusCode::BAD_REQUEST, "text/plain", reason)
        }
    };
    (status, [(http::header::CONTENT_TYPE, kind)], text)
}

/// Answers an `AdmissionReview`, both as JSON. `namespace`: the API server has seen that the pod's namespace is opted in.
///
/// # Errors
/// It is no review of version 1, or has no request; the text says which.
pub fn mutate(body: &[u8], namespace: bool) -> Result<String, String> {
    let review: AdmissionReview<DynamicObject> = serde_json::from_slice(body)
        .map_err(|error| format!("no AdmissionReview of admission.k8s.io/v1: {error}"))?;
    if review.types.api_version != "admission.k8s.io/v1" || review.types.kind != "AdmissionReview" {
        let (kind, version) = (review.types.kind, review.types.api_version);
        return Err(format!(
            "{kind} of {version}: only AdmissionReview of admission.k8s.io/v1 is answered"
        ));
    }
    let request: AdmissionRequest<DynamicObject> = review
        .try_into()
        .map_err(|error| format!("AdmissionReview: {error}"))?;
    let mut response = AdmissionResponse::from(&request);
    let pod = request.object.filter(|_| {
        request.kind.kind == "Pod" && request.kind.group.is_empty() && request.operation == Operation::Create
    });
    let mut octets = None;
    if let Some(pod) = pod {
        let change = change(&pod, namespace);
        response.warnings = (!change.warnings.is_empty()).then_some(change.warnings);
        if !change.labels.is_empty() {
            let patch = patch(pod.metadata.labels.is_some(), &change.labels);
            octets = Some(ByteString(patch.to_string().into_bytes()));
        }
    }
    let written = |error: serde_json::Error| format!("the answer: {error}");
    let mut review = serde_json::to_value(response.into_review()).map_err(written)?;
    if let Some(octets) = octets {
        // In base64, as the API defines it; kube's own field is written as a list of numbers.
        review["response"]["patchType"] = json!(PatchType::JsonPatch);
        review["response"]["patch"] = serde_json::to_value(octets).map_err(written)?;
    }
    Ok(review.to_string())
}

#[derive(Debug, Default, PartialEq)]
struct Change {
    labels: BTreeMap<&'static str, &'static str>,
    warnings: Vec<String>,
}

/// What a pod lacks.
fn change(pod: &DynamicObject, namespace: bool) -> Change {
    let mut change = Change::default();
    let opted_in = match pod.labels().get(OPT_IN) {
        Some(value) => value == OPTED_IN,
        None => namespace,
    };
    if !opted_in {
        return change;
    }
    if pod.data.pointer("/spec/hostNetwork").and_then(Value::as_bool) == Some(true) {
        change.warnings.push(format!(
            "{OPT_IN}: this pod is on its node's network and has no interface to give to a card; it is left alone"
        ));
        return change;
    }
    for (name, value) in [(OPT_IN, OPTED_IN), (INJECT, "false"), (TLS_MODE, "istio")] {
        match pod.labels().get(name) {
            Some(own) if own == value => continue,
            Some(own) => change.warnings.push(format!(
                "label {name}: {own:?} is made {value:?}, since the pod's traffic is a card's ({OPT_IN})"
            )),
            None => {}
        }
        change.labels.insert(name, value);
    }
    change
}

fn patch(has_labels: bool, labels: &BTreeMap<&str, &str>) -> Value {
    if !has_labels {
        return json!([{"op": "add", "path": "/metadata/labels", "value": labels}]);
    }
    let one = |(name, value): (&&str, &&str)| json!({"op": "add", "path": format!("/metadata/labels/{}", escaped(name)), "value": value});
    labels.iter().map(one).collect()
}

/// A name as one token of a JSON pointer.
fn escaped(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn review(operation: &str, pod: &Value) -> Vec<u8> {
        let review = json!({
            "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
            "request": {
                "uid": "u-1", "operation": operation, "name": "", "namespace": "shop",
                "kind": {"group": "", "version": "v1", "kind": "Pod"},
                "resource": {"group": "", "version": "v1", "resource": "pods"},
                "userInfo": {}, "object": pod, "dryRun": false
            }
        });
        review.to_string().into_bytes()
    }

    fn pod(labels: Value) -> Value {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"generateName": "web-", "labels": labels}, "spec": {"containers": []}})
    }

    /// The response and its patch.
    fn answered(operation: &str, pod: &Value, namespace: bool) -> (Value, Option<Value>) {
        let text = mutate(&review(operation, pod), namespace).unwrap();
        let mut json: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["apiVersion"], "admission.k8s.io/v1");
        assert_eq!(json["kind"], "AdmissionReview");
        let patch = json["response"].get("patch").map(|text| {
            let ByteString(octets) = serde_json::from_value(text.clone()).unwrap();
            serde_json::from_slice(&octets).unwrap()
        });
        (json["response"].take(), patch)
    }

    #[test]
    fn an_opted_in_pod_gets_both_labels() {
        let (response, patch) = answered("CREATE", &pod(json!({"dpumesh.io/dataplane": "dpu"})), false);
        assert_eq!(
            (&response["uid"], &response["allowed"]),
            (&json!("u-1"), &json!(true))
        );
        assert_eq!(response["patchType"], "JSONPatch");
        assert!(response["patch"].is_string(), "base64");
        assert_eq!(
            patch,
            Some(json!([
                {"op": "add", "path": "/metadata/labels/security.istio.io~1tlsMode", "value": "istio"},
                {"op": "add", "path": "/metadata/labels/sidecar.istio.io~1inject", "value": "false"},
            ]))
        );
        assert!(response.get("warnings").is_none());
    }

    #[test]
    fn a_namespace_opts_in_for_pods_that_say_nothing() {
        let bare =
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": []}});
        assert_eq!(answered("CREATE", &bare, false).1, None);
        assert_eq!(
            answered("CREATE", &bare, true).1,
            Some(json!([{"op": "add", "path": "/metadata/labels", "value": {
                "dpumesh.io/dataplane": "dpu", "sidecar.istio.io/inject": "false", "security.istio.io/tlsMode": "istio"
            }}]))
        );
        let out = pod(json!({"dpumesh.io/dataplane": "sidecar"}));
        assert_eq!(answered("CREATE", &out, true).1, None);
    }

    #[test]
    fn others_are_left_alone() {
        let opted_in = pod(json!({"dpumesh.io/dataplane": "dpu"}));
        assert_eq!(answered("UPDATE", &opted_in, false).1, None);
        assert_eq!(answered("CREATE", &pod(json!({"app": "web"})), false).1, None);
        let complete = pod(
            json!({"dpumesh.io/dataplane": "dpu", "sidecar.istio.io/inject": "false", "security.istio.io/tlsMode": "istio"}),
        );
        let (response, patch) = answered("CREATE", &complete, false);
        assert_eq!((patch, response.get("warnings")), (None, None));
        let mut host = opted_in;
        host["spec"]["hostNetwork"] = json!(true);
        let (response, patch) = answered("CREATE", &host, false);
        assert_eq!(patch, None);
        assert!(
            response["warnings"][0]
                .as_str()
                .unwrap()
                .contains("node's network")
        );
    }

    #[test]
    fn what_a_pod_says_otherwise_is_overruled_with_a_warning() {
        let pod = pod(
            json!({"dpumesh.io/dataplane": "dpu", "sidecar.istio.io/inject": "true", "security.istio.io/tlsMode": "istio"}),
        );
        let (response, patch) = answered("CREATE", &pod, false);
        assert_eq!(
            patch,
            Some(
                json!([{"op": "add", "path": "/metadata/labels/sidecar.istio.io~1inject", "value": "false"}])
            )
        );
        assert!(
            response["warnings"][0]
                .as_str()
                .unwrap()
                .contains("sidecar.istio.io/inject")
        );
    }

    #[test]
    fn names_are_escaped_once() {
        assert_eq!(escaped("a/b~c~1"), "a~1b~0c~01");
    }

    #[test]
    fn what_is_no_review_is_refused_by_name() {
        let whole = review("CREATE", &pod(json!({"dpumesh.io/dataplane": "dpu"})));
        for length in 0..whole.len() {
            assert!(mutate(&whole[..length], false).is_err());
        }
        let old = String::from_utf8(whole)
            .unwrap()
            .replace("admission.k8s.io/v1", "admission.k8s.io/v1beta1");
        assert!(mutate(old.as_bytes(), false).unwrap_err().contains("v1beta1"));
        let empty = br#"{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview"}"#;
        assert!(mutate(empty, false).unwrap_err().contains("AdmissionReview"));
    }
}
