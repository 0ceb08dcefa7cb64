//! The block that the card's netdevs share: a `clsact` qdisc on each binds its ingress to it.
//!
//! A netdev that has an ingress qdisc of somebody else's is left alone and refused by name: rules there would fight.

use std::collections::BTreeMap;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL};

use super::kernel::{Answer, Kernel, Request};
use super::octets::{Writer, find, text, u32_at};

const RTM_GETLINK: u16 = 18;
const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_GETQDISC: u16 = 38;
const IFLA_IFNAME: u16 = 3;
const TCA_KIND: u16 = 1;
const TCA_INGRESS_BLOCK: u16 = 13;
const CLSACT_HANDLE: u32 = 0xffff_0000;
const CLSACT_PARENT: u32 = 0xffff_fff1;
const TCMSG: usize = 20;
const IFINFOMSG: usize = 16;

/// What keeps a netdev from being bound.
#[derive(Debug, thiserror::Error)]
pub(super) enum BindError {
    /// The kernel refused.
    #[error("{name}: {refusal}")]
    Refused {
        name: String,
        refusal: super::kernel::Refusal,
    },
    /// Somebody else's qdisc.
    #[error(
        "{name} has an ingress qdisc ({kind}) that is not ours: remove it (`tc qdisc del dev {name} clsact`)"
    )]
    Taken { name: String, kind: String },
    /// The link to the kernel failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// Binds a netdev's ingress to the block, if it is not yet.
pub(super) fn bind(kernel: &mut dyn Kernel, link: u32, name: &str, block: u32) -> Result<(), BindError> {
    match bound(kernel, link)? {
        Some((_, Some(there))) if there == block => return Ok(()),
        Some((kind, _)) => {
            let name = name.to_owned();
            return Err(BindError::Taken { name, kind });
        }
        None => {}
    }
    let body = Writer::behind(tcmsg(link))
        .text(TCA_KIND, "clsact")
        .u32(TCA_INGRESS_BLOCK, block);
    let request = Request {
        kind: RTM_NEWQDISC,
        flags: NLM_F_CREATE | NLM_F_EXCL,
        body: body.finish(),
    };
    one(kernel, request)?
        .map(drop)
        .map_err(|refusal| BindError::Refused {
            name: name.to_owned(),
            refusal,
        })
}

/// Takes our qdisc off a netdev; somebody else's, or none, is left as it is.
pub(super) fn unbind(kernel: &mut dyn Kernel, link: u32, block: u32) -> std::io::Result<()> {
    if let Some((_, Some(there))) = bound(kernel, link)?
        && there == block
    {
        let body = Writer::behind(tcmsg(link)).text(TCA_KIND, "clsact").finish();
        let request = Request {
            kind: RTM_DELQDISC,
            flags: 0,
            body,
        };
        let _ = one(kernel, request)?; // a netdev that went meanwhile took its qdisc along
    }
    Ok(())
}

/// Names of the netdevs that exist, by index.
pub(super) fn links(kernel: &mut dyn Kernel) -> std::io::Result<BTreeMap<u32, String>> {
    let request = Request {
        kind: RTM_GETLINK,
        flags: NLM_F_DUMP,
        body: vec![0; IFINFOMSG],
    };
    let messages = one(kernel, request)?.map_err(std::io::Error::other)?;
    Ok(messages
        .iter()
        .filter_map(|message| {
            let name = text(find(message.body.get(IFINFOMSG..)?, IFLA_IFNAME)?)?;
            Some((u32_at(&message.body, 4)?, name.to_owned()))
        })
        .collect())
}

/// Kind and block of a netdev's ingress qdisc.
fn bound(kernel: &mut dyn Kernel, link: u32) -> std::io::Result<Option<(String, Option<u32>)>> {
    let request = Request {
        kind: RTM_GETQDISC,
        flags: NLM_F_DUMP,
        body: vec![0; TCMSG],
    };
    let messages = one(kernel, request)?.map_err(std::io::Error::other)?;
    Ok(messages.iter().find_map(|message| {
        let (of, parent) = (u32_at(&message.body, 4)?, u32_at(&message.body, 12)?);
        if (of, parent) != (link, CLSACT_PARENT) {
            return None;
        }
        let rest = message.body.get(TCMSG..)?;
        let block = find(rest, TCA_INGRESS_BLOCK).and_then(|block| u32_at(block, 0));
        Some((text(find(rest, TCA_KIND)?)?.to_owned(), block))
    }))
}

fn one(kernel: &mut dyn Kernel, request: Request) -> std::io::Result<Answer> {
    let mut answers = kernel.exchange(&[request])?;
    answers.pop().ok_or_else(|| std::io::Error::other("no answer"))
}

fn tcmsg(link: u32) -> Vec<u8> {
    [0, link, CLSACT_HANDLE, CLSACT_PARENT, 0]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect()
}
