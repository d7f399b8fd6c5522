//! JSON in canonical form without understanding it: a config that came from elsewhere keeps the order of its members and the digits of
//! its integers, and loses white space, spelling of strings and of fractions. Going through a map of values would round integers
//! beyond 64 bits.

use serde_json::value::RawValue;

/// The canonical text of a JSON value, or `None` if `text` is not one.
pub(super) fn canonical(text: &str) -> Option<Box<RawValue>> {
    // Once the grammar holds, dropping white space cannot join two values.
    let _: &RawValue = serde_json::from_str(text).ok()?;
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(&first) = rest.as_bytes().first() {
        let len = match first {
            b'"' => {
                let (string, len) = token::<String>(rest)?;
                out.push_str(&serde_json::to_string(&string).ok()?);
                len
            }
            b'-' | b'0'..=b'9' => {
                let (number, len) = token::<&RawValue>(rest)?;
                match number.get() {
                    digits if !digits.contains(['.', 'e', 'E']) => out.push_str(digits),
                    fraction => out.push_str(&serde_json::to_string(&fraction.parse::<f64>().ok()?).ok()?),
                }
                len
            }
            b' ' | b'\t' | b'\n' | b'\r' => 1,
            // Brackets, commas, colons, `true`, `false` and `null`.
            other => {
                out.push(char::from(other));
                1
            }
        };
        rest = rest.get(len..)?;
    }
    RawValue::from_string(out).ok()
}

/// The value that `text` begins with, and its length.
fn token<'a, T: serde::Deserialize<'a>>(text: &'a str) -> Option<(T, usize)> {
    let mut stream = serde_json::Deserializer::from_str(text).into_iter::<T>();
    let value = stream.next()?.ok()?;
    Some((value, stream.byte_offset()))
}

#[cfg(test)]
mod tests {
    use super::canonical;

    #[test]
    fn order_and_integers_are_kept_and_the_rest_is_normal() {
        let text = "{ \"b\" : [1e-05, 16.0, -100, 123456789012345678901234567890, 1E3],\n \"\\u0061\\n\": \"\\u00e9\\u0007/\\/\", \"n\":null}";
        let expected = "{\"b\":[0.00001,16.0,-100,123456789012345678901234567890,1000.0],\"a\\n\":\"é\\u0007//\",\"n\":null}";
        let found = canonical(text).unwrap();
        assert_eq!(found.get(), expected);
        assert_eq!(canonical(found.get()).unwrap().get(), expected);
    }

    #[test]
    fn what_is_no_json_has_no_canonical_form() {
        for text in ["", "{", "nul", "[1 2]", "{\"a\":Infinity}", "\"\\ud800\"", "é", "01", "[1,]"] {
            assert!(canonical(text).is_none(), "{text}");
        }
    }

    /// Section 5.3 of the specification: positional for exponents from -5 to 15.
    #[test]
    fn fractions_have_the_form_of_the_specification() {
        for (number, text) in [
            (2.0, "2.0"),
            (1e-5, "0.00001"),
            (1e15, "1000000000000000.0"),
            (1e-6, "1e-6"),
            (1.5e16, "1.5e+16"),
            (1e16, "1e+16"),
            (0.1, "0.1"),
            (2.1213203435596424, "2.1213203435596424"),
            (1.7976931348623157e308, "1.7976931348623157e+308"),
            (5e-324, "5e-324"),
        ] {
            assert_eq!(serde_json::to_string(&number).unwrap(), text);
        }
    }
}
