//! The quickstart's pure part, with the test that stands in it: an example that is to be run cannot be a test as well.
//! The tests of the steering rules are in `dpumesh_cni::rules`.

#[path = "../quickstart/mesh.rs"]
#[expect(dead_code, reason = "the example uses what the tests do not")]
mod mesh;
#[path = "../quickstart/trust.rs"]
#[expect(dead_code, reason = "the example uses what the tests do not")]
mod trust;
