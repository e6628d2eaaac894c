//! Network namespaces of a test's own, with Python interpreters in them.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sched::{CloneFlags, setns};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Runs a command that must succeed.
pub(crate) fn run(command: &str) {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {text}");
}

/// A network namespace; removed on drop.
pub(crate) struct Netns {
    pub(crate) name: String,
}

impl Netns {
    pub(crate) fn new(what: &str) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // as `cargo xtask sweep` knows it
        let name = format!("bl{}-{number}-{what}", std::process::id());
        run(&format!("ip netns add {name} && ip -n {name} link set lo up"));
        Self { name }
    }

    /// Runs `ip` with these arguments in it.
    pub(crate) fn ip(&self, arguments: &str) {
        run(&format!("ip -n {} {arguments}", self.name));
    }

    pub(crate) fn sysctl(&self, setting: &str) {
        run(&format!("ip netns exec {} sysctl -qw {setting}", self.name));
    }

    /// Puts the calling thread into it.
    pub(crate) fn enter(&self) {
        let file = File::open(format!("/run/netns/{}", self.name)).unwrap();
        setns(file, CloneFlags::CLONE_NEWNET).unwrap();
    }

    /// A veth pair between this namespace and another, up; the addresses (with lengths) are on the ends, and usable at once.
    pub(crate) fn join(&self, device: &str, other: &Self, peer: &str, addresses: &[(&str, &str)]) {
        self.ip(&format!(
            "link add {device} type veth peer name {peer} netns {}",
            other.name
        ));
        for (here, there) in addresses {
            let flag = if here.contains(':') { "nodad" } else { "" };
            self.ip(&format!("addr add {here} dev {device} {flag}"));
            other.ip(&format!("addr add {there} dev {peer} {flag}"));
        }
        self.ip(&format!("link set {device} up"));
        other.ip(&format!("link set {peer} up"));
    }

    /// Index of a device.
    pub(crate) fn index(&self, device: &str) -> u32 {
        let output = Command::new("ip")
            .args(["-n", &self.name, "-o", "link", "show", "dev", device])
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        text.split(':').next().unwrap().trim().parse().unwrap()
    }

    pub(crate) fn python(&self) -> Python {
        Python::new(&self.name)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// A Python interpreter in a namespace that runs one line at a time and answers with what it gives.
pub(crate) struct Python {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

/// `ask_*` give what the server said, or the name of the error. Servers answer with their name and the client that they
/// see, then echo.
const LOOP: &str = r#"
import socket, sys, errno, threading, hashlib, time
S = {}
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
for code in sys.stdin:
    try: r = eval(code)
    except Exception as e: r = repr(e)
    print(r, flush=True)
"#;

impl Python {
    fn new(namespace: &str) -> Self {
        let file = File::open(format!("/run/netns/{namespace}")).unwrap();
        let mut command = Command::new("python3");
        command
            .args(["-u", "-c", LOOP])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        // SAFETY: one system call between fork and exec.
        unsafe {
            command.pre_exec(move || Ok(setns(&file, CloneFlags::CLONE_NEWNET)?));
        }
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
}

impl Drop for Python {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
