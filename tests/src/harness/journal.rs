//! The results as JUnit XML, which most CI systems show.

use anyhow::{Context, Result};
use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};
use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// One check of a test.
pub struct Record {
    pub name: String,
    result: Result<(), String>,
}

impl Record {
    pub fn new(name: &str, result: Result<(), String>) -> Self {
        Self {
            name: name.into(),
            result,
        }
    }

    /// What was found instead, where it failed.
    pub fn failure(&self) -> Option<&str> {
        self.result.as_ref().err().map(String::as_str)
    }
}

/// Results of the tests so far.
#[derive(Default)]
pub struct Journal {
    suites: Mutex<Vec<TestSuite>>,
}

impl Journal {
    /// Adds a test that took `time` with its checks; without any, the test
    /// itself is one.
    pub fn add(&self, test: &str, time: Duration, records: Vec<Record>) {
        let mut suite = TestSuite::new(test);
        suite.set_time(time);
        for record in &records {
            let status = match record.failure() {
                None => TestCaseStatus::success(),
                Some(found) => {
                    let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
                    status.set_message(found);
                    status
                }
            };
            let mut case = TestCase::new(&record.name, status);
            case.set_classname(test);
            suite.add_test_case(case);
        }
        if records.is_empty() {
            suite.add_test_case(TestCase::new(test, TestCaseStatus::success()));
        }
        self.suites
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(suite);
    }

    /// Writes them to `path`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, name: &str, path: &Path) -> Result<()> {
        let mut report = Report::new(name);
        let suites = self.suites.lock().unwrap_or_else(PoisonError::into_inner);
        report.add_test_suites(suites.iter().cloned());
        let text = report.to_string()?;
        path.parent()
            .map_or(Ok(()), fs::create_dir_all)
            .and_then(|()| fs::write(path, text))
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_found_in_the_file() {
        let journal = Journal::default();
        let records = vec![
            Record::new("good", Ok(())),
            Record::new("bad", Err("3 < 4".into())),
        ];
        journal.add("module::test", Duration::from_secs(2), records);
        let path = std::env::temp_dir().join(format!("vireo-journal-{}.xml", std::process::id()));
        journal.write("machines", &path).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        fs::remove_file(path).unwrap();
        assert!(
            text.contains(r#"tests="2""#) && text.contains(r#"failures="1""#),
            "{text}"
        );
        assert!(text.contains("3 &lt; 4"), "{text}");
    }
}
