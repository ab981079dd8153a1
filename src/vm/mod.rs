//! One guest: its memory, how it boots, and the tables that it is shown.

pub mod acpi;
pub mod boot;
pub mod console;
pub mod control;
pub mod fw_cfg;
pub mod machine;
pub mod mailbox;
pub mod memory;
pub mod memory_map;
pub mod mp;
pub mod screen;
pub mod slots;
pub mod stillness;
