"use strict";
// A line and a note that follow the pointer over a chart; the readings lie in its data-hover.
const note = document.getElementById("tip");

function nearest(at, x) {
  let best = 0;
  for (let i = 1; i < at.length; i += 1)
    if (Math.abs(at[i][0] - x) < Math.abs(at[best][0] - x)) best = i;
  return at[best];
}

function place(event) {
  const left = Math.min(event.clientX + 14, window.innerWidth - note.offsetWidth - 8);
  note.style.left = `${Math.max(8, left)}px`;
  note.style.top = `${Math.max(8, event.clientY - note.offsetHeight - 12)}px`;
}

for (const svg of document.querySelectorAll("svg[data-hover]")) {
  const { top, bottom, at } = JSON.parse(svg.dataset.hover);
  const line = document.createElementNS(svg.namespaceURI, "line");
  line.setAttribute("class", "cursor");
  line.setAttribute("y1", top);
  line.setAttribute("y2", bottom);
  svg.append(line);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const [x, text] = nearest(at, ((event.clientX - box.left) * svg.viewBox.baseVal.width) / box.width);
    line.setAttribute("x1", x);
    line.setAttribute("x2", x);
    line.style.visibility = "visible";
    note.textContent = text;
    note.hidden = false;
    place(event);
  });
  svg.addEventListener("pointerleave", () => {
    line.style.visibility = "hidden";
    note.hidden = true;
  });
}
