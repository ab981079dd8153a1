mod forms;
mod fpu;
mod fuzz;
mod machine;
mod native;

use super::*;
use machine::Ram;
