"""A trained case as a person looks at it: live in the browser, as a report, as pages to send."""
