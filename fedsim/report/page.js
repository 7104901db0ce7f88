"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const coarse = window.matchMedia("(pointer: coarse)");
  const dashes = ["solid", "dash", "dot", "dashdot"];
  let printing = false;

  function colours() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(name).trim();
    return {
      ink: read("--ink"), muted: read("--muted"), line: read("--line"), card: read("--card"),
      series: read("--series").split(/\s+/),
    };
  }

  // On paper the figures take the light colours, whatever the screen has.
  function paper() {
    return {
      ink: "#161a20", muted: "#59626e", line: "#dfe3e8", card: "#ffffff",
      series: ["#2a78d6", "#d9541e", "#14905f", "#a66f00", "#c43d78", "#5a49b8", "#0b7f8c", "#c22f2f"],
    };
  }

  function axis(colour, title, more) {
    return Object.assign({
      title: { text: title, font: { color: colour.muted, size: 13 }, standoff: 10 }, automargin: true,
      gridcolor: colour.line, linecolor: colour.line, zeroline: false, tickfont: { color: colour.muted, size: 12 },
    }, more);
  }

  function layout(colour, more) {
    return Object.assign({
      margin: { l: 8, r: 14, t: 8, b: 8 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, color: colour.ink, size: 13 },
      dragmode: coarse.matches ? false : "zoom",
      hoverlabel: { bgcolor: colour.card, bordercolor: colour.line, font: { color: colour.ink }, align: "left" },
    }, more);
  }

  function lines(figure, against, colour) {
    const format = figure.percent ? ".1%" : ".4~g";
    const data = figure.traces.map((trace) => ({
      type: "scatter", x: trace.x[against], y: trace.y, name: trace.name,
      mode: trace.y.length <= 40 && trace.dash === "solid" ? "lines+markers" : "lines", marker: { size: 5 }, cliponaxis: false,
      line: {
        color: colour.series[trace.color % colour.series.length], width: 2,
        dash: trace.dash === "solid" ? dashes[Math.floor(trace.color / colour.series.length) % 4] : trace.dash,
      },
      hovertemplate: "%{y:" + format + "}<extra>%{fullData.name}</extra>",
    }));
    return [data, layout(colour, {
      hovermode: "x unified", showlegend: data.length > 1,
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", font: { size: 12 } },
      xaxis: axis(colour, figure.axes[against], { rangemode: "tozero" }),
      yaxis: axis(colour, figure.ytitle, figure.percent ? { tickformat: ".0%" } : { rangemode: "tozero" }),
    })];
  }

  function bars(figure, colour) {
    const format = figure.percent ? ".0%" : ".4~g";
    const data = [{
      type: "bar", x: figure.x, y: figure.y, width: figure.width * 0.92,
      marker: { color: colour.series[0] }, hovertemplate: "%{x:" + format + "}: %{y}<extra></extra>",
    }];
    return [data, layout(colour, {
      showlegend: false, bargap: 0, margin: { l: 8, r: 14, t: figure.marks.length ? 24 : 8, b: 8 },
      xaxis: axis(colour, figure.xtitle, { range: figure.range, showgrid: false, tickformat: figure.percent ? ".0%" : "" }),
      yaxis: axis(colour, figure.ytitle, { rangemode: "tozero" }),
      shapes: figure.marks.map((mark) => ({
        type: "line", x0: mark.x, x1: mark.x, yref: "paper", y0: 0, y1: 1, line: { color: colour.ink, width: 1.5, dash: "dot" },
      })),
      annotations: figure.marks.map((mark) => ({
        x: mark.x, yref: "paper", y: 1, yanchor: "bottom", text: mark.text, showarrow: false, font: { size: 12 },
      })),
    })];
  }

  function draw() {
    const chosen = document.querySelector("input[name=axis]:checked");
    const against = chosen ? chosen.value : "round";
    const colour = printing ? paper() : colours();
    for (const [name, figure] of Object.entries(figures)) {
      const place = document.getElementById("figure-" + name);
      const [data, look] = figure.kind === "lines" ? lines(figure, against, colour) : bars(figure, colour);
      if (printing) look.width = Math.min(place.clientWidth, 640);  // what fits a page, whatever the window's width
      Plotly.react(place, data, look, { displayModeBar: false, responsive: true });
    }
  }

  for (const choice of document.querySelectorAll("input[name=axis]")) choice.addEventListener("change", draw);
  dark.addEventListener("change", draw);
  window.addEventListener("beforeprint", () => { printing = true; draw(); });
  window.addEventListener("afterprint", () => { printing = false; draw(); });
  draw();
})();
