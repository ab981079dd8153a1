//! An interrupt output.

/// A level that a device drives, with the memory of a rising edge, so that a
/// pulse between two looks is not lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Line {
    level: bool,
    rose: bool,
}

impl Line {
    /// Drives the line.
    #[inline]
    pub fn set(&mut self, level: bool) {
        self.rose |= level && !self.level;
        self.level = level;
    }

    /// Low, then high: one edge, and the line stays high.
    #[inline]
    pub fn pulse(&mut self) {
        self.rose = true;
        self.level = true;
    }

    /// The level now.
    #[inline]
    pub fn level(&self) -> bool {
        self.level
    }

    /// Whether the line rose since the last call.
    #[inline]
    pub fn take_edge(&mut self) -> bool {
        core::mem::take(&mut self.rose)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_edge_is_seen_once_even_when_the_line_fell_again() {
        let mut line = Line::default();
        line.set(true);
        line.set(false);
        assert!(line.take_edge());
        assert!(!line.take_edge());
        assert!(!line.level());
    }

    #[test]
    fn a_line_that_stays_high_has_one_edge() {
        let mut line = Line::default();
        line.set(true);
        assert!(line.take_edge());
        line.set(true);
        assert!(!line.take_edge());
        line.pulse();
        assert!(line.take_edge());
    }
}
