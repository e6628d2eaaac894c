//! The CRC of SCTP (RFC 9260 appendix A), and how it follows a change of four bytes.
//!
//! A CRC is linear: the CRCs of two messages of one length differ by the CRC (without its initial and final inversion) of
//! the messages' difference. Of a difference that is zero after the changed word, that is the word's own CRC, multiplied by
//! x for every bit that follows it.

/// The Castagnoli polynomial, reflected.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// The longest message in bytes that [`changed`] is right for: more than an IP packet can hold.
pub const MAX_LEN: u32 = (1 << STEPS) - 1;

const STEPS: usize = 17;

/// `POWERS[k]` is x to the power 8 x 2^k modulo the polynomial, reflected.
const POWERS: [u32; STEPS] = {
    let mut powers = [0; STEPS];
    // x^8
    powers[0] = 1 << (31 - 8);
    let mut k = 1;
    while k < STEPS {
        powers[k] = product(powers[k - 1], powers[k - 1]);
        k += 1;
    }
    powers
};

/// The product of two polynomials modulo the polynomial, all reflected: bit 31 is x^0.
#[inline(always)]
const fn product(a: u32, mut b: u32) -> u32 {
    let mut sum = 0;
    let mut bit = 0;
    while bit < 32 {
        // all ones or zero: no branches for the verifier to explore
        let chosen = 0_u32.wrapping_sub((a >> (31 - bit)) & 1);
        sum ^= b & chosen;
        b = (b >> 1) ^ (POLYNOMIAL & 0_u32.wrapping_sub(b & 1));
        bit += 1;
    }
    sum
}

/// The field (little-endian in the packet, here as a number) after the word at some place has changed from `old` to `new`
/// (as they lie in memory), with `after` bytes behind that word, at most [`MAX_LEN`].
#[inline(always)]
#[must_use]
pub const fn changed(field: u32, old: u32, new: u32, after: u32) -> u32 {
    let mut crc = u32::from_le(old ^ new);
    // the CRC of the word itself: four bytes are multiplied by x^32
    crc = product(crc, POWERS[2]);
    let mut k = 0;
    while k < STEPS {
        if after >> k & 1 == 1 {
            crc = product(crc, POWERS[k]);
        }
        k += 1;
    }
    field ^ crc
}

/// The CRC of a whole message, as a number.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (POLYNOMIAL & 0_u32.wrapping_sub(crc & 1))
        })
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// RFC 3720 B.4 has these; the first is every catalogue's check value.
    #[test]
    fn the_crc_is_the_standards() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }

    proptest! {
        #[test]
        fn a_change_gives_what_a_new_crc_gives(
            mut bytes in proptest::collection::vec(any::<u8>(), 4..3000),
            at: prop::sample::Index,
            new: [u8; 4],
        ) {
            let field = crc32c(&bytes);
            let at = at.index(bytes.len() - 3);
            let old: [u8; 4] = bytes[at..at + 4].try_into().unwrap();
            bytes[at..at + 4].copy_from_slice(&new);
            let after = u32::try_from(bytes.len() - at - 4).unwrap();
            let got = changed(field, u32::from_ne_bytes(old), u32::from_ne_bytes(new), after);
            prop_assert_eq!(got, crc32c(&bytes));
        }
    }

    #[test]
    fn long_messages_too() {
        let mut bytes = [0x5a; MAX_LEN as usize + 4];
        let field = crc32c(&bytes);
        bytes[..4].copy_from_slice(&[1, 2, 3, 4]);
        let old = u32::from_ne_bytes([0x5a; 4]);
        let new = u32::from_ne_bytes([1, 2, 3, 4]);
        assert_eq!(changed(field, old, new, MAX_LEN), crc32c(&bytes));
    }
}
