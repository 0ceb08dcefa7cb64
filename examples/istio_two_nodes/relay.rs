//! A Unix socket of the SoC that leads to an address, octet by octet: stock Envoy's sockets are all in the stack's namespace,
//! where the management network is not. TLS goes through it from end to end.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

/// Serves for ever.
pub(crate) fn serve(path: &Path, target: SocketAddr) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    println!("ready");
    for near in listener.incoming() {
        let near = near?;
        // Whoever connects sees the end of a connection that leads nowhere, and tries again.
        if let Ok(far) = TcpStream::connect(target) {
            thread::spawn(move || join(&near, &far));
        }
    }
    Ok(())
}

fn join(near: &UnixStream, far: &TcpStream) {
    let _ = far.set_nodelay(true);
    thread::scope(|scope| {
        scope.spawn(|| {
            let _ = io::copy(&mut &*near, &mut &*far);
            let _ = far.shutdown(Shutdown::Both);
        });
        let _ = io::copy(&mut &*far, &mut &*near);
        let _ = near.shutdown(Shutdown::Both);
    });
}
