// The field on top of the systems: rows that do not hold all of its words are hidden, and areas without rows.
document.querySelectorAll("input.filter").forEach((field) => {
  const words = () => field.value.toLowerCase().split(/\s+/).filter(Boolean);
  field.addEventListener("input", () => {
    document.querySelectorAll(".md-content table").forEach((table) => {
      let shown = 0;
      table.querySelectorAll("tbody tr").forEach((row) => {
        const text = row.textContent.toLowerCase();
        row.hidden = !words().every((word) => text.includes(word));
        shown += row.hidden ? 0 : 1;
      });
      let heading = table.parentElement;
      while (heading && heading.tagName !== "H2") heading = heading.previousElementSibling ?? heading.parentElement;
      table.hidden = shown === 0;
      if (heading) heading.hidden = shown === 0;
    });
  });
});
