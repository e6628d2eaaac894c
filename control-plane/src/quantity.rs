//! Quantities such as `100m`, `1.5Gi` and `2e3` (k8s.io/apimachinery/pkg/api/resource).

/// Digits that are read; more would not fit the arithmetic below.
const DIGITS: usize = 24;

/// A quantity in thousandths, rounded up; nothing if the text is none.
pub fn milli(text: &str) -> Option<i128> {
    let end = text
        .find(|letter: char| !(letter.is_ascii_digit() || matches!(letter, '+' | '-' | '.')))
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (factor, exponent) = suffix_value(suffix)?;
    let (negative, digits) = match number.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, number.strip_prefix('+').unwrap_or(number)),
    };
    let (whole, part) = digits.split_once('.').unwrap_or((digits, ""));
    let all = format!("{whole}{part}");
    if all.is_empty() || all.len() > DIGITS || !all.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let scale = 3_i32
        .checked_add(exponent)?
        .checked_sub(i32::try_from(part.len()).ok()?)?;
    let value = all.parse::<i128>().ok()?.checked_mul(factor)?;
    let ten = 10_i128.checked_pow(scale.unsigned_abs())?;
    let value = if scale >= 0 {
        value.checked_mul(ten)?
    } else {
        value.checked_add(ten - 1)? / ten
    };
    Some(if negative { -value } else { value })
}

/// What a suffix multiplies by: a factor and a power of ten.
fn suffix_value(suffix: &str) -> Option<(i128, i32)> {
    Some(match suffix {
        "" => (1, 0),
        "n" => (1, -9),
        "u" => (1, -6),
        "m" => (1, -3),
        "k" => (1, 3),
        "M" => (1, 6),
        "G" => (1, 9),
        "T" => (1, 12),
        "P" => (1, 15),
        "E" => (1, 18),
        "Ki" => (1 << 10, 0),
        "Mi" => (1 << 20, 0),
        "Gi" => (1 << 30, 0),
        "Ti" => (1 << 40, 0),
        "Pi" => (1 << 50, 0),
        "Ei" => (1 << 60, 0),
        other => {
            let exponent: i32 = other.strip_prefix(['e', 'E'])?.parse().ok()?;
            (1, exponent.clamp(-18, 18))
        }
    })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("0", Some(0))]
    #[case("1", Some(1000))]
    #[case("100m", Some(100))]
    #[case("1.5", Some(1500))]
    #[case(".5", Some(500))]
    #[case("1.5Gi", Some(1_610_612_736_000))]
    #[case("128974848", Some(128_974_848_000))]
    #[case("129e6", Some(129_000_000_000))]
    #[case("1E3", Some(1_000_000))]
    #[case("1E", Some(1_000_000_000_000_000_000_000))]
    #[case("8Ei", Some(9_223_372_036_854_775_808_000))]
    #[case("1n", Some(1))]
    #[case("2500u", Some(3))]
    #[case("-2", Some(-2000))]
    #[case("", None)]
    #[case("Gi", None)]
    #[case("1.2.3", None)]
    #[case("1-2", None)]
    #[case("1Zi", None)]
    #[case("1e", None)]
    #[case("99999999999999999999999999", None)]
    fn quantities(#[case] text: &str, #[case] wanted: Option<i128>) {
        assert_eq!(milli(text), wanted);
    }

    proptest::proptest! {
        #[test]
        fn no_text_is_too_odd(text in "[-+.0-9eEinumkKMGTPi]{0,40}") {
            milli(&text);
        }
    }
}
