//! [`Args`]: `CNI_ARGS`, `KEY=VALUE` pairs between semicolons, in whatever order, with whatever else is in there.

/// What of `CNI_ARGS` is of use here. `IgnoreUnknown` is not asked for: unknown keys are ignored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Args {
    /// `K8S_POD_NAME`.
    pub pod_name: Option<String>,
    /// `K8S_POD_NAMESPACE`.
    pub pod_namespace: Option<String>,
    /// `K8S_POD_UID`.
    pub pod_uid: Option<String>,
    /// `MAC`: the address that the interface shall have, as text.
    pub mac: Option<String>,
}

impl Args {
    /// Reads the pairs. A piece without `=` and an empty value are skipped; of a key that comes twice, the last counts.
    pub fn parse(text: &str) -> Self {
        let mut args = Self::default();
        for (key, value) in text.split(';').filter_map(|pair| pair.split_once('=')) {
            let field = match key.trim() {
                "K8S_POD_NAME" => &mut args.pod_name,
                "K8S_POD_NAMESPACE" => &mut args.pod_namespace,
                "K8S_POD_UID" => &mut args.pod_uid,
                "MAC" => &mut args.mac,
                _ => continue,
            };
            let value = value.trim();
            if !value.is_empty() {
                *field = Some(value.to_owned());
            }
        }
        args
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_order_of_arguments_does_not_matter(
            order in Just(vec![
                "IgnoreUnknown=true", "K8S_POD_NAME=web", "K8S_POD_NAMESPACE=shop", "K8S_POD_UID=7", "X=a=b", "",
                "K8S_POD_INFRA_CONTAINER_ID=abc", "odd",
            ]).prop_shuffle(),
        ) {
            let args = Args::parse(&order.join(";"));
            prop_assert_eq!(args.pod_name.as_deref(), Some("web"));
            prop_assert_eq!(args.pod_namespace.as_deref(), Some("shop"));
            prop_assert_eq!(args.pod_uid.as_deref(), Some("7"));
        }

        #[test]
        fn no_text_panics(text in ".*") {
            Args::parse(&text);
        }
    }

    #[test]
    fn podman_names_a_mac_and_no_namespace() {
        let args = Args::parse("IgnoreUnknown=1;K8S_POD_NAME=web;MAC=02:00:00:00:00:07;K8S_POD_NAMESPACE=");
        assert_eq!(args.mac.as_deref(), Some("02:00:00:00:00:07"));
        assert_eq!(args.pod_namespace, None);
    }
}
