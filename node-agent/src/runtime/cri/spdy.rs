//! As much of SPDY/3.1 as the streams of a command need: every container runtime serves them so.
//!
//! Headers of frames are a zlib stream. What is sent is in blocks that are not compressed, and what is received of them is
//! not looked at, so nothing has to be compressed here.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt as _};

const SYN_STREAM: u8 = 1;
const RST_STREAM: u8 = 3;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const FIN: u8 = 1;
/// Every control frame begins with it.
const VERSION: [u8; 2] = [0x80, 0x03];
/// A zlib stream without a dictionary.
const ZLIB: [u8; 2] = [0x78, 0x01];
/// An empty block: all before it can be read.
const FLUSH: [u8; 5] = [0x00, 0x00, 0x00, 0xff, 0xff];

/// Something of the other side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Frame {
    Data {
        stream: u32,
        bytes: Vec<u8>,
        last: bool,
    },
    /// To be sent back as it is.
    Ping(Vec<u8>),
    /// The stream has ended badly.
    Reset(u32),
    /// All streams have.
    Goaway,
    Other,
}

fn frame(head: [u8; 4], flags: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes();
    [&head[..], &[flags], &length[1..], payload].concat()
}

/// Opens a stream, with one header; `first`: it is the first one of the connection.
pub(super) fn open(stream: u32, name: &str, value: &str, first: bool) -> Vec<u8> {
    let text = |text: &str| [&length(text.len())[..], text.as_bytes()].concat();
    let headers = [&length(1)[..], &text(name), &text(value)].concat();
    let size = u16::try_from(headers.len()).unwrap_or(u16::MAX);
    let begin: &[u8] = if first { &ZLIB } else { &[] };
    let block = [
        begin,
        &[0x00],
        &size.to_le_bytes(),
        &(!size).to_le_bytes(),
        &headers,
        &FLUSH,
    ]
    .concat();
    // No associated stream, no priority.
    let payload = [&stream.to_be_bytes()[..], &[0; 6], &block].concat();
    frame([VERSION[0], VERSION[1], 0, SYN_STREAM], 0, &payload)
}

fn length(of: usize) -> [u8; 4] {
    u32::try_from(of).unwrap_or(u32::MAX).to_be_bytes()
}

/// Bytes of a stream, fewer than 2^24; `last`: there are no more.
pub(super) fn data(stream: u32, bytes: &[u8], last: bool) -> Vec<u8> {
    frame(stream.to_be_bytes(), if last { FIN } else { 0 }, bytes)
}

/// The next frame.
///
/// # Errors
/// When the connection ends.
pub(super) async fn next(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Frame> {
    let mut head = [0; 8];
    from.read_exact(&mut head).await?;
    let [a, b, c, d, flags, x, y, z] = head;
    let mut payload = vec![0; usize::try_from(u32::from_be_bytes([0, x, y, z])).map_err(io::Error::other)?];
    from.read_exact(&mut payload).await?;
    if a & 0x80 == 0 {
        return Ok(Frame::Data {
            stream: u32::from_be_bytes([a, b, c, d]),
            bytes: payload,
            last: flags & FIN != 0,
        });
    }
    Ok(match d {
        PING => Frame::Ping([&head[..], &payload].concat()),
        GOAWAY => Frame::Goaway,
        RST_STREAM => match payload.first_chunk() {
            Some(stream) => Frame::Reset(u32::from_be_bytes(*stream)),
            None => Frame::Other,
        },
        _ => Frame::Other,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_a_zlib_stream() {
        let first = open(1, "streamtype", "error", true);
        assert_eq!(
            first[..8],
            [0x80, 3, 0, 1, 0, 0, 0, u8::try_from(first.len() - 8).unwrap()]
        );
        assert_eq!(first[8..18], [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        // RFC 1950: the first two bytes are a multiple of 31
        assert_eq!(u16::from_be_bytes([first[18], first[19]]) % 31, 0);
        assert_eq!(first[20], 0);
        let size = u16::from_le_bytes([first[21], first[22]]);
        assert_eq!(u16::from_le_bytes([first[23], first[24]]), !size);
        assert_eq!(usize::from(size), first.len() - 25 - FLUSH.len());
        let second = open(3, "streamtype", "error", false);
        assert_eq!(second.len(), first.len() - ZLIB.len());
    }

    #[tokio::test]
    async fn what_is_sent_is_understood() {
        let bytes = [
            data(5, b"hello", false),
            frame([0x80, 3, 0, PING], 0, &[0, 0, 0, 2]),
            open(7, "a", "b", true),
            frame([0x80, 3, 0, RST_STREAM], 0, &[0, 0, 0, 5, 0, 0, 0, 1]),
            data(5, b"", true),
        ]
        .concat();
        let mut from = bytes.as_slice();
        let mut found = Vec::new();
        while let Ok(frame) = next(&mut from).await {
            found.push(frame);
        }
        let of = |bytes: &[u8], last| Frame::Data {
            stream: 5,
            bytes: bytes.to_vec(),
            last,
        };
        let ping = Frame::Ping(vec![0x80, 3, 0, PING, 0, 0, 0, 4, 0, 0, 0, 2]);
        assert_eq!(
            found,
            [
                of(b"hello", false),
                ping,
                Frame::Other,
                Frame::Reset(5),
                of(b"", true)
            ]
        );
    }
}
