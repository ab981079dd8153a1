mod forms;
mod fpu;
mod fuzz;
mod machine;
mod native;
mod returns;

use super::*;
use machine::Ram;
