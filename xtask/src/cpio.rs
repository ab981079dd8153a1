//! The "newc" cpio archive, the format of Linux initramfs images.
//!
//! Source: Linux `Documentation/driver-api/early-userspace/buffer-format.rst`.
//! The kernel unpacks several archives behind one another, compressed or not,
//! so a file can be laid over an initrd without opening it.

/// File type bits of `st_mode`.
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;

/// The alignment of headers and data, in bytes; also what the kernel wants
/// between two archives.
const ALIGN: usize = 4;

/// An archive under construction. Everything belongs to root and dates from
/// the epoch, so equal contents give equal bytes.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// An archive without entries.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory. Its parents must be in the archive, or in the
    /// kernel's built-in one (`/dev`, `/root`), already.
    pub fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY | 0o755, &[]);
    }

    /// Adds a regular file with the permission bits `mode`.
    pub fn file(&mut self, path: &str, mode: u32, contents: &[u8]) {
        self.entry(path, REGULAR | mode, contents);
    }

    /// Adds a symbolic link at `path` to `target`.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.entry(path, SYMLINK | 0o777, target.as_bytes());
    }

    /// The finished archive; its length is a multiple of four bytes.
    pub fn finish(mut self) -> Vec<u8> {
        self.entries = 0;
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, contents: &[u8]) {
        self.entries += 1;
        let name = path.trim_start_matches('/');
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        let size = contents.len() as u32;
        let fields = [
            self.entries, // inode
            mode,
            0, // user
            0, // group
            links,
            0, // modification time
            size,
            0, // device major
            0, // device minor
            0, // rdev major
            0, // rdev minor
            name.len() as u32 + 1,
            0, // checksum, unused in this variant
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes
            .resize(self.bytes.len().next_multiple_of(ALIGN), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An independent reader: (name, mode, contents) of each entry.
    fn read(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let total = bytes.len();
        let mut entries = Vec::new();
        loop {
            let field = |n: usize| {
                let text = std::str::from_utf8(&bytes[6 + 8 * n..14 + 8 * n]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            assert_eq!(&bytes[..6], b"070701");
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name = String::from_utf8(bytes[110..110 + name_size - 1].to_vec()).unwrap();
            assert_eq!(bytes[110 + name_size - 1], 0);
            let at = total - bytes.len();
            let data = (at + 110 + name_size).next_multiple_of(4) - at;
            let contents = bytes[data..data + size].to_vec();
            let next = (at + data + size).next_multiple_of(4) - at;
            if name == "TRAILER!!!" {
                assert_eq!(bytes.len(), next);
                return entries;
            }
            entries.push((name, mode, contents));
            bytes = &bytes[next..];
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let mut archive = Archive::new();
        archive.directory("/bin");
        archive.file("/bin/a", 0o755, b"12345");
        archive.symlink("/bin/longer-name", "a");
        archive.file("/empty", 0o644, b"");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(
            read(&bytes),
            [
                ("bin".into(), 0o040_755, vec![]),
                ("bin/a".into(), 0o100_755, b"12345".to_vec()),
                ("bin/longer-name".into(), 0o120_777, b"a".to_vec()),
                ("empty".into(), 0o100_644, vec![]),
            ]
        );
    }
}
