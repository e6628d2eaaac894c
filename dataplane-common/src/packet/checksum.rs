//! Checksums that follow a change without a look at the whole packet.
#![expect(
    clippy::cast_possible_truncation,
    reason = "carries have been folded in before each cast"
)]

/// The change that replacing `old` by `new` makes to a sum of 16-bit words (RFC 1624, equation 3), added to `difference`.
/// Words are as they lie in memory: the ones' complement sum does not mind the byte order (RFC 1071 2).
///
/// It is what `bpf_csum_diff` computes, and what `bpf_l3_csum_replace` and `bpf_l4_csum_replace` take with size 0.
#[inline(always)]
#[must_use]
pub const fn difference(difference: u32, old: u32, new: u32) -> u32 {
    let sum = difference as u64 + !old as u64 + new as u64;
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    // at most one more carry is left
    ((sum & 0xffff_ffff) + (sum >> 32)) as u32
}

/// Two bytes as they lie in memory, as a word for [`difference`].
#[inline(always)]
#[must_use]
pub const fn word(bytes: [u8; 2]) -> u32 {
    u16::from_ne_bytes(bytes) as u32
}

/// A sum with one more word, or another sum, in it.
#[inline(always)]
#[must_use]
pub const fn add(sum: u32, more: u32) -> u32 {
    difference(sum, u32::MAX, more)
}

/// The value of a checksum field that computing the checksum over the field's own value gives again, where `sum` is the
/// sum of everything else. A packet with this value stays as it is whether or not something later puts a checksum there
/// that is computed over the bytes as they are.
///
/// With the field `v`, the checksum is `!(sum + v)`, so that `2 v = !sum`; modulo 65,535, halving is a rotation by one bit.
#[inline(always)]
#[must_use]
pub const fn settled(sum: u32) -> u16 {
    let field = (!fold(sum)).rotate_right(1);
    // 0 says in UDP that there is none, and what computes it writes this instead
    if field == 0 { u16::MAX } else { field }
}

/// Folds a sum to 16 bits.
#[inline(always)]
#[must_use]
pub const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// The checksum field (as it lies in memory) after a change.
#[inline(always)]
#[must_use]
pub const fn apply(field: u16, change: u32) -> u16 {
    let sum = !field as u64 + change as u64;
    !fold(((sum & 0xffff_ffff) + (sum >> 32)) as u32)
}

/// The sum of a byte string, not complemented (RFC 1071); `start` is the sum of what belongs before it.
#[must_use]
pub fn sum(start: u32, bytes: &[u8]) -> u32 {
    let (pairs, rest) = bytes.as_chunks::<2>();
    let last = rest.first().map(|byte| [*byte, 0]);
    let words = pairs.iter().copied().chain(last);
    words.fold(start, |sum, pair| add(sum, word(pair)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// RFC 1071 3: the example of the specification.
    #[test]
    fn the_sum_is_the_rfcs() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(fold(sum(0, &bytes)).to_ne_bytes(), [0xdd, 0xf2]);
        assert_eq!(sum(0, &[]), 0);
        assert_eq!(fold(sum(0, &[0xab])).to_ne_bytes(), [0xab, 0]);
    }

    proptest! {
        #[test]
        fn a_change_gives_what_a_new_sum_gives(
            mut bytes in proptest::collection::vec(any::<u8>(), 8..200),
            at: prop::sample::Index,
            new: [u8; 4],
        ) {
            let field = !fold(sum(0, &bytes));
            let at = at.index(bytes.len() / 4) * 4;
            let at = at.min(bytes.len() - 4) & !1;
            let old: [u8; 4] = bytes[at..at + 4].try_into().unwrap();
            bytes[at..at + 4].copy_from_slice(&new);
            let change = difference(0, u32::from_ne_bytes(old), u32::from_ne_bytes(new));
            let expected = !fold(sum(0, &bytes));
            // 0 and 0xffff are the same number: RFC 1624 3
            let normal = |field: u16| if field == 0xffff { 0 } else { field };
            prop_assert_eq!(normal(apply(field, change)), normal(expected));
        }

        #[test]
        fn a_settled_field_is_what_is_computed_over_it(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            let field = settled(sum(0, &bytes));
            let computed = !fold(add(sum(0, &bytes), u32::from(field)));
            prop_assert_eq!(if computed == 0 { u16::MAX } else { computed }, field);
        }

        #[test]
        fn differences_add_up(words in proptest::collection::vec(any::<(u32, u32)>(), 0..40), field: u16) {
            let one = words.iter().fold(0, |d, (old, new)| difference(d, *old, *new));
            let each = words.iter().fold(field, |f, (old, new)| apply(f, difference(0, *old, *new)));
            let normal = |field: u16| if field == 0xffff { 0 } else { field };
            prop_assert_eq!(normal(apply(field, one)), normal(each));
        }
    }
}
