//! The quickstart's pure parts, with the tests that stand in them: an example that is to be run cannot be a test as well.

#[path = "../quickstart/agent.rs"]
mod agent;
#[path = "../quickstart/mesh.rs"]
#[expect(dead_code, reason = "the example uses what the tests do not")]
mod mesh;
