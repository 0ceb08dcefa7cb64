//! `istio-dpu-cni`: the CNI plugin. A container runtime calls it; people can ask `--help` and `--version`.

use std::io::Write;
use std::process::ExitCode;

use dpumesh_cni::plugin::run;
use dpumesh_cni::protocol::Environment;

const HELP: &str = "\
istio-dpu-cni: gives a pod a virtual function of the node's DPU

A container runtime calls this program (CNI 1.0.0 and 1.1.0): the call is in the environment, the configuration on
standard input, the answer on standard output. It talks to istio-dpu-agent, which must run on the same host.

A configuration, as /etc/cni/net.d/10-dpumesh.conflist:
  {
    \"cniVersion\": \"1.0.0\",
    \"name\": \"mesh\",
    \"plugins\": [{
      \"type\": \"istio-dpu-cni\",
      \"ipam\": { \"type\": \"host-local\", \"subnet\": \"10.244.1.0/24\" }
    }]
  }

Optional fields of the plugin:
  agentSocket   where the agent listens              /run/dpumesh/agent.sock
  agentTimeout  seconds to wait for one answer       60
  mtu           largest L3 packet                    what the card leaves
  routes        [{\"dst\",\"gw\"}] besides those of IPAM
  defaultRoute  true, false                          where the pod has none yet
  deviceID      PCI address of the function to take  any free one
";

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("--help" | "-h") => return print(HELP),
        Some("--version" | "-V") => return print(concat!("istio-dpu-cni ", env!("CARGO_PKG_VERSION"), "\n")),
        _ => {}
    }
    let outcome = run(Environment::of_process(), std::io::stdin().lock());
    if let Some(output) = outcome.output {
        print(&format!("{output}\n"));
    }
    ExitCode::from(u8::from(!outcome.success))
}

fn print(text: &str) -> ExitCode {
    // A runtime that has closed its end does not want to know.
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}
