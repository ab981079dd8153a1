//! The disk image: a GPT with one EFI system partition, or no more than a file
//! system for a BIOS.
//!
//! Its size is a whole number of cylinders of [`HEADS`] heads with
//! [`SECTORS`] sectors, which is what Bochs wants for a flat image. Equal
//! contents give equal images: identifiers and times are fixed, so that runs
//! of the emulator can be compared to the tick.

use anyhow::{Context, Result, ensure};
use fatfs::{FatType, FormatVolumeOptions, FsOptions};
use fscommon::{BufStream, StreamSlice};
use std::fs::File;
use std::io::Write;
use std::path::Path;

/// Bytes of a sector.
const SECTOR: u64 = 512;
/// Heads of the geometry.
pub const HEADS: u64 = 16;
/// Sectors of a track.
pub const SECTORS: u64 = 63;
/// Bytes of a cylinder.
pub const CYLINDER: u64 = HEADS * SECTORS * SECTOR;
/// Where a partition starts: 1 MiB, as partitioning tools do.
const START: u64 = (1 << 20) / SECTOR;
/// The backup partition table at the end: 32 sectors of entries and a header.
const BACKUP: u64 = 33;
/// The fewest clusters that make a file system FAT32 (Microsoft, "FAT32 File
/// System Specification", section 3.5), and a margin.
const LEAST_CLUSTERS: u64 = 65_525 + 16;
/// The file in the image that the firmware starts.
pub const LOADER: &str = "EFI/BOOT/BOOTX64.EFI";
/// Identifies the disk and the partition.
const DISK_ID: u128 = 0x5669_7265_6f00_4469_736b_0000_0000_0001;

/// One file in the image.
pub struct Entry {
    /// The path from the root of the volume, with `/` between its parts.
    pub path: String,
    /// The contents.
    pub contents: Vec<u8>,
}

/// Sizes that follow from the contents.
#[derive(Debug, PartialEq, Eq)]
struct Layout {
    /// Bytes of a cluster.
    cluster: u32,
    /// The first sector of the file system.
    start: u64,
    /// Sectors of the file system.
    volume: u64,
    /// Sectors of the disk.
    disk: u64,
}

impl Layout {
    /// The layout for files of `sizes` bytes, with a partition table or
    /// without.
    fn for_files(sizes: impl Iterator<Item = u64> + Clone, partitioned: bool) -> Self {
        let (start, backup) = if partitioned { (START, BACKUP) } else { (0, 0) };
        let total: u64 = sizes.clone().sum();
        let cluster = if total < 256 << 20 { SECTOR } else { 4096 };
        // Two clusters of folder for each file: its own and its parent's.
        let used: u64 = sizes.map(|size| size.div_ceil(cluster) + 2).sum();
        let clusters = (used + used / 64 + 64).max(LEAST_CLUSTERS);
        // Two tables of four bytes for each cluster, and the reserved sectors.
        let tables = 2 * (clusters * 4).div_ceil(SECTOR) + 64;
        let wanted = start + clusters * (cluster / SECTOR) + tables + backup;
        let disk = (wanted * SECTOR).next_multiple_of(CYLINDER) / SECTOR;
        Self {
            cluster: cluster as u32,
            start,
            volume: disk - start - backup,
            disk,
        }
    }
}

/// Writes an image with `files` to `path`.
///
/// # Errors
/// When the file cannot be written, or a path is not possible on FAT.
pub fn write(path: &Path, files: &[Entry]) -> Result<()> {
    write_image(path, files, true)
}

/// Writes an image without partitions, whose first sector is that of the file
/// system.
///
/// # Errors
/// As for [`write`].
pub fn write_unpartitioned(path: &Path, files: &[Entry]) -> Result<()> {
    write_image(path, files, false)
}

fn write_image(path: &Path, files: &[Entry], partitioned: bool) -> Result<()> {
    let sizes = files.iter().map(|file| file.contents.len() as u64);
    write_layout(path, files, &Layout::for_files(sizes, partitioned))
        .with_context(|| format!("cannot write the disk image {}", path.display()))
}

fn write_layout(path: &Path, files: &[Entry], layout: &Layout) -> Result<()> {
    let mut disk = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)?;
    disk.set_len(layout.disk * SECTOR)?;
    if layout.start > 0 {
        partition(&mut disk, layout)?;
    }
    let start = layout.start * SECTOR;
    let slice = StreamSlice::new(disk, start, start + layout.volume * SECTOR)?;
    let mut volume = BufStream::new(slice);
    let options = FormatVolumeOptions::new()
        .fat_type(FatType::Fat32)
        .bytes_per_cluster(layout.cluster)
        .volume_id(DISK_ID as u32)
        .volume_label(*b"VIREO      ");
    fatfs::format_volume(&mut volume, options)?;
    let filesystem = fatfs::FileSystem::new(volume, FsOptions::new())?;
    let root = filesystem.root_dir();
    for file in files {
        let mut folder = root.clone();
        let mut parts = file.path.split('/').peekable();
        while let Some(part) = parts.next() {
            ensure!(
                !matches!(part, "" | "." | ".."),
                "the path {} is not possible in the image",
                file.path
            );
            if parts.peek().is_some() {
                folder = folder.create_dir(part)?;
            } else {
                let mut target = folder.create_file(part)?;
                target.truncate()?;
                target.write_all(&file.contents)?;
                target.flush()?;
            }
        }
    }
    drop(root);
    filesystem.unmount()?;
    Ok(())
}

fn partition(disk: &mut File, layout: &Layout) -> Result<()> {
    let last_lba = u32::try_from(layout.disk - 1)
        .context("the guest images are too large for one disk image")?;
    gpt::mbr::ProtectiveMBR::with_lb_size(last_lba).overwrite_lba0(disk)?;
    let mut table = gpt::GptConfig::new()
        .writable(true)
        .logical_block_size(gpt::disk::LogicalBlockSize::Lb512)
        .create_from_device(&mut *disk, Some(gpt_id(0)))?;
    let id = table.add_partition_at(
        "EFI system partition",
        1,
        layout.start,
        layout.volume,
        gpt::partition_types::EFI,
        0,
    )?;
    let mut partitions = table.take_partitions();
    if let Some(partition) = partitions.get_mut(&id) {
        partition.part_guid = gpt_id(1);
    }
    table.update_partitions(partitions)?;
    table.write()?;
    Ok(())
}

fn gpt_id(number: u128) -> uuid::Uuid {
    uuid::Uuid::from_u128(DISK_ID + number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn the_disk_is_whole_cylinders_and_holds_everything() {
        for size in [0, 1, 20 << 20, 300 << 20, 1500 << 20] {
            for (partitioned, tables) in [(true, START + BACKUP), (false, 0)] {
                let layout = Layout::for_files([size, 1000].into_iter(), partitioned);
                assert_eq!(layout.disk * SECTOR % CYLINDER, 0);
                let clusters = layout.volume * SECTOR / u64::from(layout.cluster);
                assert!(clusters > LEAST_CLUSTERS && layout.volume * SECTOR > size);
                assert_eq!(layout.volume + tables, layout.disk);
            }
        }
        assert!(Layout::for_files([15 << 20].into_iter(), true).disk * SECTOR < 48 << 20);
    }

    #[test]
    fn the_firmware_would_find_the_files() {
        let folder = std::env::temp_dir().join(format!("vireo-image-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let (path, again) = (folder.join("disk.img"), folder.join("again.img"));
        let large: Vec<u8> = (0..5_000_000_u32).map(|n| (n >> 3) as u8).collect();
        let files = || {
            [
                Entry {
                    path: LOADER.into(),
                    contents: b"MZ".to_vec(),
                },
                Entry {
                    path: "vireo/vireo.toml".into(),
                    contents: b"[[vm]]\n".to_vec(),
                },
                Entry {
                    path: "vireo/guests/a long name-6.1.0.img".into(),
                    contents: large.clone(),
                },
            ]
        };
        write(&path, &files()).unwrap();
        write(&again, &files()).unwrap();
        assert!(
            std::fs::read(&path).unwrap() == std::fs::read(&again).unwrap(),
            "not repeatable"
        );

        let table = gpt::GptConfig::new().open(&path).unwrap();
        let partition = table.partitions().values().next().unwrap().clone();
        assert_eq!(partition.part_type_guid, gpt::partition_types::EFI);
        let (start, end) = (
            partition.first_lba * SECTOR,
            (partition.last_lba + 1) * SECTOR,
        );
        let slice = StreamSlice::new(File::open(&path).unwrap(), start, end).unwrap();
        let volume = fatfs::FileSystem::new(ReadOnly(slice), FsOptions::new()).unwrap();
        assert_eq!(volume.fat_type(), FatType::Fat32);
        for file in files() {
            let mut contents = Vec::new();
            volume
                .root_dir()
                .open_file(&file.path)
                .unwrap()
                .read_to_end(&mut contents)
                .unwrap();
            assert!(contents == file.contents, "{} differs", file.path);
        }
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_path_out_of_the_volume_is_refused() {
        let path = std::env::temp_dir().join(format!("vireo-image-path-{}", std::process::id()));
        let error = write(
            &path,
            &[Entry {
                path: "vireo/../../x".into(),
                contents: vec![],
            }],
        )
        .unwrap_err();
        assert!(format!("{error:#}").contains("vireo/../../x"));
        std::fs::remove_file(path).unwrap();
    }

    /// A reader that pretends to take writes, as the library asks for both.
    struct ReadOnly(StreamSlice<File>);

    impl Read for ReadOnly {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            self.0.read(buffer)
        }
    }

    impl Write for ReadOnly {
        fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
            Ok(buffer.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl std::io::Seek for ReadOnly {
        fn seek(&mut self, to: std::io::SeekFrom) -> std::io::Result<u64> {
            self.0.seek(to)
        }
    }
}
