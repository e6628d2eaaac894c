//! Python interpreters as clients and servers: sockets are made with the plain system calls, so what they report is what any
//! program sees.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use nix::sched::{CloneFlags, setns, unshare};

/// An interpreter that runs one line at a time and answers with what it gives, or with the name of the error.
pub(crate) struct Python {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

const HEAD: &str = r#"
import socket, sys, errno, threading, hashlib, time
S = {}
"#;

const LOOP: &str = r#"
for code in sys.stdin:
    try: r = eval(code)
    except OSError as e: r = errno.errorcode.get(e.errno, str(e))
    except Exception as e: r = repr(e)
    print(r, flush=True)
"#;

/// Bare sockets.
const SOCKETS: &str = r#"
def tcp(f=socket.AF_INET): return socket.socket(f, socket.SOCK_STREAM)
def udp(f=socket.AF_INET):
    s = socket.socket(f, socket.SOCK_DGRAM); s.settimeout(5); return s
def name(f):
    try: return f()
    except OSError as e: return errno.errorcode[e.errno]
"#;

/// `ask_*` give what the server said, or the name of the error. Servers answer with their name and the client that they
/// see, then echo.
const SERVERS: &str = r#"
def family(ip): return socket.AF_INET6 if ':' in ip else socket.AF_INET
def told(f):
    try: return f()
    except TimeoutError: return 'TIMEOUT'
    except OSError as e: return errno.errorcode.get(e.errno, str(e))
def who(name, peer): return f'{name} {peer[0]}'.encode()
def tcp_serve(ip, port, name, kind=0):
    s = socket.socket(family(ip), socket.SOCK_STREAM, kind)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind((ip, port)); s.listen(128)
    def talk(c, peer):
        try:
            c.sendall(who(name, peer) + b'\n')
            while data := c.recv(65536): c.sendall(data)
        except OSError: pass
        c.close()
    def loop():
        while True:
            c, peer = s.accept()
            threading.Thread(target=talk, args=(c, peer), daemon=True).start()
    threading.Thread(target=loop, daemon=True).start()
def udp_serve(ip, port, name):
    s = socket.socket(family(ip), socket.SOCK_DGRAM); s.bind((ip, port))
    def loop():
        while True:
            data, peer = s.recvfrom(65536)
            s.sendto(who(name, peer) + b' ' + data, peer)
    threading.Thread(target=loop, daemon=True).start()
def line(s):
    got = b''
    while not got.endswith(b'\n'):
        data = s.recv(1)
        if not data: break
        got += data
    return got.decode().strip()
def tcp_open(ip, port, kind=0, timeout=3):
    s = socket.socket(family(ip), socket.SOCK_STREAM, kind); s.settimeout(timeout)
    s.connect((ip, port)); return s
def tcp(ip, port, kind=0, timeout=3):
    def f():
        with tcp_open(ip, port, kind, timeout) as s: return line(s)
    return told(f)
def tcp_keep(key, ip, port):
    def f():
        S[key] = tcp_open(ip, port); return line(S[key])
    return told(f)
def echo(key, text):
    def f():
        S[key].sendall(text.encode()); return S[key].recv(100).decode()
    return told(f)
def bulk(ip, port, size):
    'Sends and receives at once; True if it is the same.'
    def f():
        with tcp_open(ip, port) as s:
            line(s); data = bytes(i * 7 % 251 for i in range(65521)) * (size // 65521 + 1); data = data[:size]
            t = threading.Thread(target=s.sendall, args=(data,)); t.start()
            got = bytearray()
            while len(got) < size:
                more = s.recv(65536)
                if not more: break
                got += more
            t.join(); return bytes(got) == data
    return told(f)
def udp(ip, port, text='hello', timeout=3, source=0):
    def f():
        with socket.socket(family(ip), socket.SOCK_DGRAM) as s:
            s.settimeout(timeout)
            if source: s.bind(('', source))
            s.connect((ip, port)); s.send(text.encode())
            got = s.recv(65536).decode()
            return got if len(got) < 200 else len(got)
    return told(f)
def checksum_in_software(device):
    import array, fcntl, struct
    off = array.array('B', struct.pack('II', 0x17, 0)) # ETHTOOL_STXCSUM
    request = struct.pack('16sP', device.encode(), off.buffer_info()[0])
    with socket.socket() as s: fcntl.ioctl(s, 0x8946, request) # SIOCETHTOOL
"#;

impl Python {
    /// In a cgroup, with bare sockets.
    pub(crate) fn in_cgroup(cgroup: &Path) -> Self {
        let procs = cgroup.join("cgroup.procs");
        // "0" means the writing process itself
        Self::start(SOCKETS, move || fs::write(&procs, "0"))
    }

    /// The same in a network namespace of its own, as a pod is.
    pub(crate) fn isolated(cgroup: &Path) -> Self {
        let procs = cgroup.join("cgroup.procs");
        Self::start(SOCKETS, move || {
            fs::write(&procs, "0")?;
            Ok(unshare(CloneFlags::CLONE_NEWNET)?)
        })
    }

    /// In a network namespace that has a name, with servers and those who ask them.
    pub(super) fn in_namespace(name: &str) -> Self {
        let file = File::open(format!("/run/netns/{name}")).unwrap();
        Self::start(SERVERS, move || Ok(setns(&file, CloneFlags::CLONE_NEWNET)?))
    }

    fn start(functions: &str, place: impl FnMut() -> io::Result<()> + Send + Sync + 'static) -> Self {
        let mut command = Command::new("python3");
        command
            .args(["-u", "-c", &[HEAD, functions, LOOP].concat()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        // SAFETY: only system calls between fork and exec.
        unsafe { command.pre_exec(place) };
        let mut child = command.spawn().unwrap();
        let (input, output) = (
            child.stdin.take().unwrap(),
            BufReader::new(child.stdout.take().unwrap()),
        );
        Self { child, input, output }
    }

    pub(crate) fn ask(&mut self, expression: &str) -> String {
        writeln!(self.input, "{expression}").unwrap();
        let mut line = String::new();
        assert!(
            self.output.read_line(&mut line).unwrap() > 0,
            "the interpreter died at {expression}"
        );
        line.trim().to_string()
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
    }
}

impl Drop for Python {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
