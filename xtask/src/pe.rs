//! The ELF to PE conversion of the loader.

/// Makes an EFI application of the linked loader.
///
/// # Errors
/// Always: the conversion comes with the loader.
pub fn convert(_elf: &[u8]) -> anyhow::Result<Vec<u8>> {
    anyhow::bail!("the loader is not there yet")
}
