//! stub
pub fn convert(_: &[u8]) -> anyhow::Result<Vec<u8>> {
    anyhow::bail!("stub")
}
