-- Continues limiter.lua: admits a call, or says when it may come back.

local function configure(asked)
  for _, d in ipairs(asked) do
    local b = dimensions[d.name]
    if not b or (d.labelled and now - (b.at or now) >= IDLE) then b = {}; dimensions[d.name] = b end
    b.period, b.whole, b.labelled, b.ceiling = d.period, d.whole, d.labelled or nil, d.ceiling
    local bound = b.learned or d.assumed
    if d.ceiling and (not bound or d.ceiling < bound) then bound = d.ceiling end
    if bound ~= b.limit then
      local before = b.limit and level(b)
      b.limit = bound
      if before and bound then put(b, min(before, capacity(b))) end
    end
    if bound and not b.level then put(b, level(b)) end -- a cold bucket fills from its first request on
  end
end

local function count_workers(worker)
  local count = 0
  if worker then state.workers[worker] = now end
  for name, seen in pairs(state.workers) do
    if seen <= now - SEEN then state.workers[name] = nil else count = count + 1 end
  end
  return count
end

-- Whose turn is it?  Start-time fair queueing by dominant share: the team with the smallest start tag is next.
local function position(r, member)
  local team, rival = state.teams[r.team], nil
  local q = {team = team, tag = team and team.tag or max(state.virtual, state.finish[r.team] or 0), turn = true}
  for name, other in pairs(state.teams) do
    if name ~= r.team and (not rival or other.tag < state.teams[rival].tag
        or (other.tag == state.teams[rival].tag and name < rival)) then rival = name end
  end
  if rival and q.tag > state.teams[rival].tag + 1e-9 then
    q.turn, q.rival = false, state.teams[rival].first
  end
  q.place = state.waiting > 0 and tonumber(call('HGET', PLACES, member) or nil) or nil
  local gone, first = team and team.gone or 0, team and team.first
  q.ahead = q.place and max(0, q.place - gone - 1) or (team and team.came or 0) - gone
  if first and not (q.place and q.place <= first.place) then
    q.elder, q.ahead = first, max(1, q.ahead)
  end
  local weights = state.weights + (team and 0 or r.weight)
  q.before = min(state.waiting - (q.place and 1 or 0), q.ahead * weights / r.weight)
  if not q.turn then q.before = max(q.before, 1) end
  return q
end

local function line_up(r, q, member, cost, wait)
  local team = state.teams[r.team]
  if not q.place then
    if not team then
      team = {tag = q.tag, came = 0, gone = 0, weight = r.weight}
      state.teams[r.team] = team
      state.weights = state.weights + r.weight
    end
    team.came = team.came + 1
    q.place = team.came
    state.waiting = state.waiting + 1
    call('HSET', PLACES, member, q.place)
  end
  local first = team and team.first
  if team and (not first or q.place <= first.place) then
    local since = first and q.place == first.place and first.since or now
    team.first = {member = member, place = q.place, since = since, due = now + wait, cost = cost}
  end
  call('ZADD', WAITING, now + wait, member)
  if not state.queue_until or state.queue_until - now < QUEUE_KEPT / 2 or state.waiting == 1 then
    call('PEXPIRE', WAITING, QUEUE_KEPT)
    call('PEXPIRE', PLACES, QUEUE_KEPT)
    state.queue_until = now + QUEUE_KEPT
  end
  due(now + wait + GRACE)
  state.denied = state.denied + 1
end

local function acquire(r)
  changed = true
  configure(r.dimensions)
  local workers = count_workers(r.worker)
  local function granted()
    local limits = {}
    for name, b in pairs(dimensions) do if not b.labelled then limits[name] = b.limit end end
    return {kind = 'grant', workers = workers, now = now, limits = limits}
  end
  if state.calls[r.id] then return granted() end
  local cost, share = {}, 0
  for _, d in ipairs(r.dimensions) do
    local b = dimensions[d.name]
    cost[d.name] = d.cost
    if b.limit then
      if d.cost > b.limit then return {kind = 'never', dimension = d.name, cost = d.cost, limit = b.limit} end
      if not b.labelled then share = max(share, d.cost * b.period / b.limit / 1000) end
    end
  end
  tidy()

  -- Blocked for all callers?
  local base, why = 0, nil
  local function later(time, reason) if time > base then base, why = time, reason end end
  later(max(state.closed or 0, account.closed or 0) - now, 'retry_after')
  local opens, probing = state.breaker_until or 0, false
  if opens > now then later(opens - now, 'breaker')
  elseif opens > 0 then
    if (state.probe_until or 0) > now then later(min(state.probe_until - now, 1000), 'breaker') else probing = true end
  end
  local member = r.team .. '\n' .. r.ticket
  local q = position(r, member)

  -- Is there enough capacity?
  local room, idle, turn = base == 0, true, q.turn
  for _, d in ipairs(r.dimensions) do
    local b = dimensions[d.name]
    local left = b.limit and d.cost > 0 and told(b)
    if left and left < d.cost then
      room = false
      if b.window then later(b.left_until - now, d.name) else later((d.cost - left) * b.period / b.limit, d.name) end
    end
  end
  local soonest = base
  for _, d in ipairs(r.dimensions) do
    local b = dimensions[d.name]
    if b.limit and d.cost > 0 then
      local has, cap, mean, need = level(b), capacity(b), b.mean or d.cost, starts(b, d.cost)
      -- The first call may need more than the others.  Its amount is kept free; otherwise it would be overtaken
      -- forever.
      local first = q.elder and q.elder.cost[d.name]
      local more = first and max(0, starts(b, first) - mean) or 0
      if has < need then room = false end
      -- The calls ahead may be for other labels, and take nothing of this bucket.
      if not b.labelled and has < max(need, cap * VALVE) then
        idle = false
        if has < need + q.ahead * mean + more then turn = false end
      end
      local missing = need + q.before * mean + more - min(cap, has + base * rate(b))
      if (has < need or not b.labelled) and base + missing / rate(b) > soonest then
        soonest = base + missing / rate(b)
        if has < need or not why then why = d.name end
      end
    end
  end
  local allowed = max(1, math.floor(r.seats * state.slowdown))
  if state.in_flight >= allowed then
    room, why = false, why or 'concurrency'
    soonest = max(soonest, base + (q.before + 1) * (state.latency or 1000) / allowed)
  elseif allowed - state.in_flight < 1 + max(1, VALVE * BURST * allowed) then
    idle = false
    if allowed - state.in_flight <= q.ahead then turn = false end
  end
  if robs(q.elder, cost) or robs(q.rival, cost) then idle, turn = false, false end

  if not room or not (turn or idle) then
    local soft = max(soonest - base, room and max(5, 1000 * (state.mean_share or 0)) or 0)
    if soft > PATIENT then soft = PATIENT + 0.6 * (soft - PATIENT) end
    local wait = max(5, base + soft)
    line_up(r, q, member, cost, wait)
    return {kind = 'wait', wait = wait, why = why or 'turn', due = now + wait}
  end

  local reserved, before = {}, {}
  for _, d in ipairs(r.dimensions) do
    local b = dimensions[d.name]
    if b.limit then
      local left = told(b)
      if left then b.left, b.left_at = left - d.cost, now end
      put(b, level(b) - d.cost)
      b.spent = (b.spent or 0) + d.cost
      b.mean = b.mean or d.cost
      reserved[d.name], before[d.name] = d.cost, b.spent
    end
  end
  state.mean_share = 0.9 * (state.mean_share or share) + 0.1 * share
  state.virtual = max(state.virtual, q.tag)
  state.finish[r.team] = q.tag + share / r.weight
  for name, tag in pairs(state.finish) do
    if tag < state.virtual then state.finish[name] = nil end -- expired tags have no effect
  end
  if q.team then q.team.tag = q.tag + share / r.weight end
  if q.place then leave(member) end
  local m = state.slowdown
  if m < 1 then state.slowdown = min(1, m + RECOVERY * max(share, 1 / r.seats) / m) end -- only while the rate is used
  if probing then state.probe_until, state.probe = now + B_PROBE, r.id end
  state.granted = state.granted + 1
  state.in_flight = state.in_flight + 1
  state.calls[r.id] = pack_call({
    ends = now + r.lease, team = r.team, weight = r.weight, at = now, number = state.granted, share = share,
    lease = r.lease, reserved = reserved, before = before
  })
  due(now + r.lease)
  return granted()
end
