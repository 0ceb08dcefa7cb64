//! Many connections at once.

use crate::harness::{Client, Endpoint, Running, simple};

#[test]
fn a_thousand_connections_are_served_at_once() {
    let endpoint = Endpoint::start("only");
    // A thousand connects at once may overflow the endpoint's backlog: the kernel asks again after a second.
    let patient = simple(endpoint.address, "").replace("connect_timeout: 1s", "connect_timeout: 5s");
    let running = Running::start(&patient);
    let mut clients: Vec<Client> = (0..1000).map(|_| running.client()).collect();
    for round in 0..3 {
        for client in &mut clients {
            client.send(format!("GET /n{round} HTTP/1.1\r\nHost: a\r\n\r\n"));
        }
        for client in &mut clients {
            let response = client.receive();
            assert_eq!(response.status(), 200, "{}", response.text());
        }
    }
    assert_eq!(running.stat("http.web.downstream_cx_active"), 1000);
    assert_eq!(endpoint.requests(), 3000);
    drop(clients);
    running.await_stat("http.web.downstream_cx_destroy", 1000);
    assert_eq!(running.stat("http.web.downstream_cx_active"), 0);
}
