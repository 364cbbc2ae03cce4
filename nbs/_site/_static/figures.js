// Draws every interactive figure of the page from the JSON that it carries.
"use strict";

function drawFigure(figure) {
  const spec = JSON.parse(figure.querySelector("script").textContent);
  const place = figure.appendChild(document.createElement("div"));
  const config = { ...spec.config, responsive: true, displaylogo: false };
  Plotly.newPlot(place, { data: spec.data, layout: spec.layout, frames: spec.frames, config });
}

window.addEventListener("load", () => document.querySelectorAll(".cola-figure").forEach(drawFigure));
