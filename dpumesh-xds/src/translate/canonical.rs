//! One encoding for one meaning: fields by number, map entries by their bytes.
//!
//! Protobuf leaves the order of map entries open, and readers keep maps in hash order. Whoever compares content by its bytes has to settle it.
//! An `Any` of a known type is put in order as well.

use prost_reflect::prost::Message as _;
use prost_reflect::prost::encoding::{decode_varint, encode_varint};
use prost_reflect::{DynamicMessage, Kind, MessageDescriptor, ReflectMessage as _};

/// The canonical encoding of a message.
pub(crate) fn encode(message: &DynamicMessage) -> Vec<u8> {
    let plain = message.encode_to_vec();
    canonical(&message.descriptor(), &plain, 0).unwrap_or(plain)
}

/// Levels of nesting that are put in order; protobuf readers stop at a hundred.
const MAX_DEPTH: usize = 100;

/// `None` when the bytes are not what the descriptor says (group-encoded unknown fields, for one).
fn canonical(descriptor: &MessageDescriptor, bytes: &[u8], depth: usize) -> Option<Vec<u8>> {
    if depth > MAX_DEPTH {
        return None;
    }
    let mut fields: Vec<(u32, bool, Vec<u8>)> = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let start = rest;
        let key = decode_varint(&mut rest).ok()?;
        let number = u32::try_from(key >> 3).ok()?;
        let field = descriptor.get_field(number);
        let is_map = field.as_ref().is_some_and(prost_reflect::FieldDescriptor::is_map);
        if key & 7 == 2 {
            let payload = take_delimited(&mut rest)?;
            let nested = field.and_then(|field| match field.kind() {
                Kind::Message(nested) => Some(nested),
                _ => None,
            });
            let payload = match nested {
                Some(nested) => canonical(&nested, payload, depth + 1)?,
                None => payload.to_vec(),
            };
            let mut out = Vec::with_capacity(payload.len() + 8);
            encode_varint(key, &mut out);
            encode_varint(payload.len() as u64, &mut out);
            out.extend_from_slice(&payload);
            fields.push((number, is_map, out));
            continue;
        }
        match key & 7 {
            0 => drop(decode_varint(&mut rest).ok()?),
            1 => rest = rest.get(8..)?,
            5 => rest = rest.get(4..)?,
            _ => return None,
        }
        fields.push((number, false, start[..start.len() - rest.len()].to_vec()));
    }
    if descriptor.full_name() == "google.protobuf.Any" {
        put_any_in_order(&mut fields, depth);
    }
    fields.sort_by(|a, b| (a.0, a.1.then_some(&a.2)).cmp(&(b.0, b.1.then_some(&b.2))));
    Some(fields.into_iter().flat_map(|(_, _, bytes)| bytes).collect())
}

/// Type URL and value of an `Any`, by field number.
const TYPE_URL: u32 = 1;
const VALUE: u32 = 2;

fn put_any_in_order(fields: &mut [(u32, bool, Vec<u8>)], depth: usize) -> Option<()> {
    let payload = |fields: &[(u32, bool, Vec<u8>)], number| -> Option<Vec<u8>> {
        let mut bytes = fields.iter().find(|(n, ..)| *n == number)?.2.as_slice();
        decode_varint(&mut bytes).ok()?;
        take_delimited(&mut bytes).map(<[u8]>::to_vec)
    };
    let url = String::from_utf8(payload(fields, TYPE_URL)?).ok()?;
    let inner = crate::schema::message(url.rsplit('/').next()?)?;
    let ordered = canonical(&inner, &payload(fields, VALUE)?, depth + 1)?;
    let field = fields.iter_mut().find(|(n, ..)| *n == VALUE)?;
    field.2.clear();
    encode_varint(u64::from(VALUE << 3 | 2), &mut field.2);
    encode_varint(ordered.len() as u64, &mut field.2);
    field.2.extend_from_slice(&ordered);
    Some(())
}

fn take_delimited<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = usize::try_from(decode_varint(rest).ok()?).ok()?;
    if length > rest.len() {
        return None;
    }
    let (payload, after) = rest.split_at(length);
    *rest = after;
    Some(payload)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema;

    #[test]
    fn the_order_in_which_a_map_was_filled_leaves_no_trace() {
        let names: Vec<String> = (0..40).map(|n| format!("policy-{n}")).collect();
        let message = |order: Vec<&String>| {
            let policies: serde_json::Map<_, _> = order
                .iter()
                .map(|n| ((*n).clone(), serde_json::json!({})))
                .collect();
            let value = serde_json::json!({"rules": {"policies": policies}});
            schema::value_to_message("envoy.extensions.filters.http.rbac.v3.RBAC", &value, "").unwrap()
        };
        let forwards = encode(&message(names.iter().collect()));
        for _ in 0..8 {
            assert_eq!(forwards, encode(&message(names.iter().rev().collect())));
        }
        let again = DynamicMessage::decode(message(Vec::new()).descriptor(), &*forwards).unwrap();
        assert_eq!(again, message(names.iter().collect()));
    }
}
