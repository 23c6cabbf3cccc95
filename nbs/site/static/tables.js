// Tables that sort and filter. Long ones come as data (window.siteTables) and are drawn a page at a time.
(() => {
  "use strict";
  const PAGE = 200;
  const asNumber = (text) => (text.trim() === "" ? NaN : Number(text.replace("−", "-").replace(/,/g, "").replace(/%$/, "")));

  function compare(a, b, column, down) {
    const [x, y] = [a[column], b[column]], [m, n] = [asNumber(x), asNumber(y)];
    if (x === y) return 0;
    if (x === "") return 1; // Empty cells stay last
    if (y === "") return -1;
    const order = Number.isNaN(m) || Number.isNaN(n) ? x.localeCompare(y, "en", { numeric: true }) : m - n;
    return down ? -order : order;
  }

  function setUp(box) {
    const table = box.querySelector("table"), body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
    const data = box.dataset.rows ? (window.siteTables || {})[box.dataset.rows] : null;
    if (box.dataset.rows && !data) return;
    const rows = data
      ? data.map((cells) => ({ cells, text: cells.join(" ").toLowerCase() }))
      : [...body.rows].map((row) => ({ row, cells: [...row.cells].map((c) => c.textContent), text: row.textContent.toLowerCase() }));
    rows.forEach((one, number) => (one.number = number));
    let shown = PAGE, sorted = null, down = false, words = [];

    const tools = document.createElement("div");
    tools.className = "table-tools";
    const input = document.createElement("input");
    input.type = "search";
    input.placeholder = "Filter rows";
    input.setAttribute("aria-label", "Filter rows of " + box.getAttribute("aria-label"));
    const count = document.createElement("span");
    count.setAttribute("role", "status");
    const more = document.createElement("button");
    more.type = "button";
    more.className = "more";
    more.textContent = "Show more";
    tools.append(input, count, more);
    box.before(tools);

    const draw = () => {
      const found = rows.filter((one) => words.every((word) => one.text.includes(word)));
      found.sort((a, b) => (sorted === null ? 0 : compare(a.cells, b.cells, sorted, down)) || a.number - b.number);
      const some = found.slice(0, shown);
      body.replaceChildren(
        ...some.map((one) => {
          if (one.row) return one.row;
          const row = document.createElement("tr");
          for (const text of one.cells) {
            const cell = document.createElement("td");
            cell.textContent = text;
            if (text !== "" && !Number.isNaN(asNumber(text))) cell.className = "number";
            row.append(cell);
          }
          return row;
        }),
      );
      count.textContent = some.length === rows.length ? `${rows.length} rows` : `${some.length} of ${found.length} rows` + (found.length < rows.length ? ` (${rows.length} in all)` : "");
      more.hidden = some.length === found.length;
    };
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        down = sorted === column ? !down : false;
        sorted = column;
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        draw();
      });
    });
    input.addEventListener("input", () => {
      words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      shown = PAGE;
      draw();
    });
    more.addEventListener("click", () => {
      shown += PAGE * 5;
      draw();
    });
    if (!data && rows.length < 6) tools.hidden = true;
    draw();
  }

  const start = () => document.querySelectorAll(".data-table").forEach(setUp);
  if (document.readyState === "complete") start();
  else window.addEventListener("load", start);
})();
