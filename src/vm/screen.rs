//! What a guest's screen shows, as text.

use crate::devices::vga::{CELLS, TextMode};
use alloc::string::String;

/// The first characters of code page 437, which every VGA has in its ROM, up to the space.
const LOW: [char; 32] = [
    ' ', '☺', '☻', '♥', '♦', '♣', '♠', '•', '◘', '○', '◙', '♂', '♀', '♪', '♫', '☼', '►', '◄', '↕',
    '‼', '¶', '§', '▬', '↨', '↑', '↓', '→', '←', '∟', '↔', '▲', '▼',
];
/// The last ones. Those between are ASCII's.
const HIGH: [char; 129] = [
    '⌂', 'Ç', 'ü', 'é', 'â', 'ä', 'à', 'å', 'ç', 'ê', 'ë', 'è', 'ï', 'î', 'ì', 'Ä', 'Å', 'É', 'æ',
    'Æ', 'ô', 'ö', 'ò', 'û', 'ù', 'ÿ', 'Ö', 'Ü', '¢', '£', '¥', '₧', 'ƒ', 'á', 'í', 'ó', 'ú', 'ñ',
    'Ñ', 'ª', 'º', '¿', '⌐', '¬', '½', '¼', '¡', '«', '»', '░', '▒', '▓', '│', '┤', '╡', '╢', '╖',
    '╕', '╣', '║', '╗', '╝', '╜', '╛', '┐', '└', '┴', '┬', '├', '─', '┼', '╞', '╟', '╚', '╔', '╩',
    '╦', '╠', '═', '╬', '╧', '╨', '╤', '╥', '╙', '╘', '╒', '╓', '╫', '╪', '┘', '┌', '█', '▄', '▌',
    '▐', '▀', 'α', 'ß', 'Γ', 'π', 'Σ', 'σ', 'µ', 'τ', 'Φ', 'Θ', 'Ω', 'δ', '∞', 'φ', 'ε', '∩', '≡',
    '±', '≥', '≤', '⌠', '⌡', '÷', '≈', '°', '∙', '·', '√', 'ⁿ', '²', '■', ' ',
];

fn character(code: u8) -> char {
    let high = || HIGH.get(usize::from(code).checked_sub(256 - HIGH.len())?);
    let special = LOW.get(usize::from(code)).or_else(high);
    special.copied().unwrap_or(code.into())
}

/// The rows of a screen, without the spaces at their ends and without empty rows at its end.
/// `memory` is text memory: a character and its colours for each cell.
pub fn text(mode: TextMode, memory: &[u8]) -> String {
    let mut text = String::new();
    let mut written = 0;
    for row in 0..mode.rows {
        let first = mode.start.wrapping_add(row.wrapping_mul(mode.pitch));
        for column in 0..mode.columns {
            let cell = first.wrapping_add(column);
            let at = usize::from(cell % CELLS) * 2;
            text.push(character(memory.get(at).copied().unwrap_or(0)));
        }
        text.truncate(written.max(text.trim_end_matches(' ').len()));
        text.push('\n');
        written = text.len();
    }
    text.truncate(text.trim_end().len());
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::vga::Vga;
    use proptest::prelude::*;

    const MODE: TextMode = TextMode {
        start: 0,
        pitch: 80,
        columns: 80,
        rows: 25,
    };

    fn memory() -> Vec<u8> {
        vec![0; usize::from(CELLS) * 2]
    }

    fn put(memory: &mut [u8], cell: usize, characters: &[u8]) {
        for (cell, &character) in memory[cell * 2..].chunks_mut(2).zip(characters) {
            cell.copy_from_slice(&[character, 0x07]);
        }
    }

    #[test]
    fn rows_end_with_their_last_character() {
        let mut memory = memory();
        assert_eq!(text(MODE, &memory), "\n");
        put(&mut memory, 0, b"  one   ");
        put(&mut memory, 2 * 80 + 77, b"two");
        assert_eq!(
            text(MODE, &memory),
            format!("  one\n\n{}two\n", " ".repeat(77))
        );
        // Behind the last row.
        put(&mut memory, 25 * 80, b"three");
        assert!(!text(MODE, &memory).contains("three"));
    }

    #[test]
    fn the_start_goes_round_text_memory() {
        let mut memory = memory();
        put(&mut memory, 0x3ffe, b"ab");
        put(&mut memory, 0, b"cd");
        put(&mut memory, 98, b"next");
        let mode = TextMode {
            start: 0x3ffe,
            pitch: 100,
            columns: 4,
            rows: 2,
        };
        assert_eq!(text(mode, &memory), "abcd\nnext\n");
    }

    #[test]
    fn characters_are_those_of_code_page_437() {
        let mut memory = memory();
        put(
            &mut memory,
            0,
            b"\x01\x1f A~\x7f\x80\x84\xb0\xc9\xcd\xdb\xe3\xfe\xff.",
        );
        assert_eq!(text(MODE, &memory), "☺▼ A~⌂Çä░╔═█π■ .\n");
    }

    proptest! {
        /// Whatever a guest writes, it is printed as lines of printable characters.
        #[test]
        fn what_a_guest_writes_has_no_control_characters(
            cells in prop::collection::vec(any::<u8>(), 0..0x8001),
            registers in prop::collection::vec((0..25u8, any::<u8>()), 0..20),
        ) {
            let mut vga = Vga::default();
            for (index, value) in registers {
                vga.write(0x3d4, index);
                vga.write(0x3d5, value);
            }
            let mode = vga.text_mode().unwrap();
            let text = text(mode, &cells);
            prop_assert!(text.ends_with('\n'));
            prop_assert!(text.lines().count() <= usize::from(mode.rows.max(1)));
            prop_assert!(text.lines().all(|line| !line.contains(char::is_control)));
            prop_assert!(text.len() <= (usize::from(CELLS) * 4));
        }
    }
}
