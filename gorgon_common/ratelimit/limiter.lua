-- The limiter: makes every decision about one gate (a model of one provider account), each atomically in one call.
--
-- `gate.py` makes the same decisions in Python.  Every change must be made in both; the suite in
-- tests/contract/test_limiter.py checks that both give the same answers.
--
-- KEYS   1 state of the gate   2 leases (call → expiry)   3 calls in flight (call → what was reserved)
--        4 finish tag of each team   5 waiting teams (start tag)   6 waiting calls (due)   7 the queue (arrival numbers)
--        8 workers (last seen)   9 state of the account
-- ARGV   1 operation   2 milliseconds to add to the clock (tests)   then the arguments of the operation
-- The queue (7) has, for each team: the number of calls that arrived (E) and left (G), its weight (W), and the first
-- known waiting call (H: its id, its number, since when it is the first, what it needs).
-- Times are in milliseconds of the server's clock.  Dimensions: r requests per minute, d requests per day, t tokens,
-- i input tokens, o output tokens per minute.

local STATE, LEASES, CALLS, FINISH, TEAMS = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local WAITERS, LINE, WORKERS, ACCOUNT = KEYS[6], KEYS[7], KEYS[8], KEYS[9]
local call, max, min = redis.call, math.max, math.min

local DIMENSIONS = {'r', 'd', 't', 'i', 'o'}
local NAMES = {r = 'requests', d = 'requests_per_day', t = 'tokens', i = 'input_tokens', o = 'output_tokens'}
local PERIOD = {r = 60000, d = 86400000, t = 60000, i = 60000, o = 60000}

local BURST = 0.05            -- of the limit: the capacity of a bucket
local READY = 0.5             -- of the burst: a larger call starts at this level and leaves a negative level
local VALVE = 0.8             -- of the burst: above it no turn is required, so that quota is not lost
local FIRST, FULL = 0.95, 1.0 -- share of the limit that is refilled: at first, and once the headers agree
local RAISE = 0.01            -- of that share, per second
local DECREASE, FLOOR = 0.5, 0.05
local RECOVERY = 0.2          -- of the rate, for each second of capacity used
local EPOCH = 1000            -- at most one decrease in this period
local GRACE = 5000            -- a waiting call that has not returned this long after it was due is removed
local SEEN = 60000            -- workers that asked within this period count
local PATIENT = 10000         -- longer waits are shortened towards this value, because much may change meanwhile
local OLD = 10000             -- from this age on, the amount for the first call of a queue is kept free
local TIDY = 500             -- the maximum number of entries that one call cleans up
local STATE_KEPT, REST_KEPT = 172800000, 3600000
local CLOSE = 1000            -- calls admitted within this period may arrive in a different order
local STILL, WATCH = 250, 1500 -- a reset that moves by less than STILL within WATCH is the end of a window
local B_WINDOW, B_CALLS, B_SHARE, B_FIRST, B_LONGEST, B_PROBE = 10, 20, 0.5, 5000, 120000, 60000

local clock = call('TIME')
local now = clock[1] * 1000 + clock[2] / 1000 + tonumber(ARGV[2])

-- The state, read once and written back once.

local state, changed, dropped = {}, {}, {}
do
  local flat = call('HGETALL', STATE)
  for k = 1, #flat, 2 do state[flat[k]] = tonumber(flat[k + 1]) or flat[k + 1] end
end
local function get(key, default)
  local value = state[key]
  if value == nil then return default end
  return value
end
local function set(key, value)
  state[key] = value
  changed[key] = value ~= nil or nil
  if value == nil then dropped[#dropped + 1] = key end
end
local function save()
  local flat = {}
  for key in pairs(changed) do flat[#flat + 1] = key; flat[#flat + 1] = state[key] end
  if #flat > 0 then call('HSET', STATE, unpack(flat)) end
  for _, key in ipairs(dropped) do if state[key] == nil then call('HDEL', STATE, key) end end
end
local function keep()
  call('PEXPIRE', STATE, STATE_KEPT)
  for k = 2, 9 do call('PEXPIRE', KEYS[k], REST_KEPT) end
end

-- Buckets.

local function limit(d) return get(d .. 'L') end
local function capacity(d)
  local burst = BURST * limit(d)
  if d == 'r' or d == 'd' then return max(burst, 1.5) end
  return burst
end
local function rate(d) return limit(d) * get('f', FIRST) * get('m', 1) / PERIOD[d] end
local function level(d)
  local has, at = get(d .. 'l'), get(d .. 'a', now)
  local cap = capacity(d)
  if not has then
    -- After a cold start, or if Redis has lost its data: start with one second's worth, never with a full burst.
    local second = limit(d) * FIRST * 1000 / PERIOD[d]
    if d == 'r' or d == 'd' then second = max(second, 1) end
    return min(cap, second)
  end
  if has >= cap then return has end
  return min(cap, has + max(0, now - at) * rate(d))
end
local function put(d, value) set(d .. 'l', value); set(d .. 'a', now) end
local function refresh() -- must precede every change of a rate
  for _, d in ipairs(DIMENSIONS) do if limit(d) then put(d, level(d)) end end
end

-- The remaining quota that the provider itself has reported; nil if that is unknown or outdated.
local function told(d)
  local left = get(d .. 'p')
  if not left or now >= get(d .. 'pe', 0) then return nil end
  if get(d .. 'w', 0) == 1 then return left end -- a window: nothing is refilled before its end
  return left + max(0, now - get(d .. 'pa', now)) * limit(d) / PERIOD[d]
end

-- The queue.

local function leave(member)
  call('ZREM', WAITERS, member)
  if call('HDEL', LINE, member) == 0 then return end
  local team = string.match(member, '^(.-)\n')
  local first = call('HGET', LINE, team .. '\nH')
  if first and cmsgpack.unpack(first)[1] == member then call('HDEL', LINE, team .. '\nH') end
  local gone = call('HINCRBY', LINE, team .. '\nG', 1)
  local came = tonumber(call('HGET', LINE, team .. '\nE') or 0)
  if gone >= came then
    local weight = tonumber(call('HGET', LINE, team .. '\nW') or 0)
    set('sw', max(0, get('sw', 0) - weight))
    call('HDEL', LINE, team .. '\nE', team .. '\nG', team .. '\nW', team .. '\nH')
    call('ZREM', TEAMS, team)
  end
end

local function tidy()
  for _, id in ipairs(call('ZRANGEBYSCORE', LEASES, '-inf', now, 'LIMIT', 0, TIDY)) do
    call('ZREM', LEASES, id); call('HDEL', CALLS, id) -- after a crash its lease is freed; what it reserved stays spent
  end
  for _, member in ipairs(call('ZRANGEBYSCORE', WAITERS, '-inf', now - GRACE, 'LIMIT', 0, TIDY)) do leave(member) end
end

local function starts(d, cost) -- the level at which a call starts
  if d == 'r' or d == 'd' then return cost end
  return min(cost, capacity(d) * READY)
end

-- Would this call take capacity that cannot be refilled in time for a call that has long been first in its queue?
local function robs(elder, cost)
  if not elder or now - elder[3] < OLD then return false end
  local ahead = max(0, tonumber(call('ZSCORE', WAITERS, elder[1]) or now) - now)
  for k, d in ipairs(DIMENSIONS) do
    local theirs = elder[4][k]
    if limit(d) and theirs > 0 then
      if level(d) - cost[d] + ahead * rate(d) < starts(d, theirs) then return true end
      local left = told(d)
      if left and get(d .. 'w', 0) == 1 then
        if left >= theirs and left - cost[d] < theirs then return true end
      elseif left and left - cost[d] + ahead * limit(d) / PERIOD[d] < theirs then return true end
    end
  end
  return false
end

-- Operations.

local function acquire()
  local id, team, weight, lease, worker = ARGV[3], ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]
  local seats, ticket = tonumber(ARGV[8]), ARGV[9]
  local cost, share = {}, 0
  for k, d in ipairs(DIMENSIONS) do
    cost[d] = tonumber(ARGV[9 + k])
    local given, ceiling = tonumber(ARGV[14 + k]), tonumber(ARGV[19 + k])
    local bound = get(d .. 'c') or (given >= 0 and given) or nil
    if ceiling >= 0 and (not bound or ceiling < bound) then bound = ceiling end
    if ceiling ~= get(d .. 'H', -1) then set(d .. 'H', ceiling) end
    if bound ~= limit(d) then
      local before = limit(d) and level(d)
      set(d .. 'L', bound)
      if before and bound then put(d, min(before, capacity(d))) end
    end
    if bound and not get(d .. 'l') then put(d, level(d)) end -- a cold bucket fills from its first request on
  end
  call('ZADD', WORKERS, now, worker)
  call('ZREMRANGEBYSCORE', WORKERS, '-inf', now - SEEN)
  local workers = call('ZCARD', WORKERS)
  local function granted()
    local answer = {'grant', workers, string.format('%.3f', now)}
    for _, d in ipairs(DIMENSIONS) do answer[#answer + 1] = tostring(limit(d) or -1) end
    return answer
  end
  if call('HEXISTS', CALLS, id) == 1 then save() return granted() end
  for _, d in ipairs(DIMENSIONS) do
    local bound = limit(d)
    if bound then
      if cost[d] > bound then save() return {'never', NAMES[d], tostring(cost[d]), tostring(bound)} end
      share = max(share, cost[d] * PERIOD[d] / bound / 1000)
    end
  end
  tidy()

  -- Blocked for all callers?
  local base, why = 0, nil
  local function later(time, reason) if time > base then base, why = time, reason end end
  later(max(get('closed', 0), tonumber(call('HGET', ACCOUNT, 'closed') or 0)) - now, 'retry_after')
  local opens, probing = get('bo', 0), false
  if opens > now then later(opens - now, 'breaker')
  elseif opens > 0 then
    if get('bp', 0) > now then later(min(get('bp') - now, 1000), 'breaker') else probing = true end
  end
  -- Whose turn is it?  Start-time fair queueing by dominant share: the team with the smallest start tag is next.
  local virtual = get('v', 0)
  local member = team .. '\n' .. ticket
  local own = call('ZSCORE', TEAMS, team) or false
  local tag = own and tonumber(own) or max(virtual, tonumber(call('ZSCORE', FINISH, team) or 0))
  local other, before_us
  local front = call('ZRANGE', TEAMS, 0, 1, 'WITHSCORES')
  for k = 1, #front, 2 do
    if front[k] ~= team and not other then before_us, other = front[k], tonumber(front[k + 1]) end
  end
  local turn = not other or tag <= other + 1e-9
  local place = call('HGET', LINE, member)
  local line = call('HMGET', LINE, team .. '\nE', team .. '\nG', team .. '\nH')
  local came, gone = tonumber(line[1] or 0), tonumber(line[2] or 0)
  local ahead = place and max(0, tonumber(place) - gone - 1) or came - gone
  local first = line[3] and cmsgpack.unpack(line[3])
  local elder = first and not (place and tonumber(place) <= first[2]) and first
  if elder then ahead = max(1, ahead) end
  local theirs = not turn and call('HGET', LINE, before_us .. '\nH')
  local waiting = call('ZCARD', WAITERS) - (place and 1 or 0)
  local weights = get('sw', 0) + (own and 0 or weight)
  local before = min(waiting, ahead * weights / weight)
  if not turn then before = max(before, 1) end

  -- Is there enough capacity?
  local room, idle, soonest = base == 0, true, base
  for _, d in ipairs(DIMENSIONS) do
    local left = limit(d) and told(d)
    if left and left < cost[d] then
      room = false
      if get(d .. 'w', 0) == 1 then later(get(d .. 'pe') - now, NAMES[d])
      else later((cost[d] - left) * PERIOD[d] / limit(d), NAMES[d]) end
    end
  end
  soonest = base
  for k, d in ipairs(DIMENSIONS) do
    if limit(d) and cost[d] > 0 then
      local has, cap, mean, need = level(d), capacity(d), get(d .. 'n', cost[d]), starts(d, cost[d])
      -- The first call may need more than the others.  Its amount is kept free; otherwise it would be overtaken
      -- forever.
      local more = elder and max(0, starts(d, elder[4][k]) - mean) or 0
      if has < need then room = false end
      if has < max(need, cap * VALVE) then
        idle = false
        if has < need + ahead * mean + more then turn = false end
      end
      local missing = need + before * mean + more - min(cap, has + base * rate(d))
      if base + missing / rate(d) > soonest then
        soonest = base + missing / rate(d)
        if has < need or not why then why = NAMES[d] end
      end
    end
  end
  local taken, allowed = call('ZCARD', LEASES), max(1, math.floor(seats * get('m', 1)))
  if taken >= allowed then
    room, why = false, why or 'concurrency'
    soonest = max(soonest, base + (before + 1) * get('lat', 1000) / allowed)
  elseif allowed - taken < 1 + max(1, VALVE * BURST * allowed) then
    idle = false
    if allowed - taken <= ahead then turn = false end
  end
  if robs(elder, cost) or robs(theirs and cmsgpack.unpack(theirs), cost) then idle, turn = false, false end

  if not room or not (turn or idle) then
    local soft = max(soonest - base, room and max(5, 1000 * get('sn', 0)) or 0)
    if soft > PATIENT then soft = PATIENT + 0.6 * (soft - PATIENT) end
    local wait = max(5, base + soft)
    if not place then
      if not own then
        call('ZADD', TEAMS, tag, team)
        call('HSET', LINE, team .. '\nW', weight)
        set('sw', get('sw', 0) + weight)
      end
      place = call('HINCRBY', LINE, team .. '\nE', 1)
      call('HSET', LINE, member, place)
    end
    place = tonumber(place)
    if not first or place <= first[2] then
      local since, needs = first and place == first[2] and first[3] or now, {}
      for k, d in ipairs(DIMENSIONS) do needs[k] = cost[d] end
      call('HSET', LINE, team .. '\nH', cmsgpack.pack({member, place, since, needs}))
    end
    call('ZADD', WAITERS, now + wait, member)
    set('no', get('no', 0) + 1)
    save()
    keep()
    return {'wait', string.format('%.3f', wait), why or 'turn', string.format('%.3f', now + wait)}
  end

  local reserved, before_it = {}, {}
  for _, d in ipairs(DIMENSIONS) do
    reserved[#reserved + 1] = cost[d]
    if limit(d) then
      local left = told(d)
      if left then set(d .. 'p', left - cost[d]); set(d .. 'pa', now) end
      put(d, level(d) - cost[d])
      set(d .. 'k', get(d .. 'k', 0) + cost[d])
      if not get(d .. 'n') then set(d .. 'n', cost[d]) end
    end
    before_it[#before_it + 1] = get(d .. 'k', 0)
  end
  set('sn', 0.9 * get('sn', share) + 0.1 * share)
  set('v', max(virtual, tag))
  call('ZADD', FINISH, tag + share / weight, team)
  call('ZREMRANGEBYSCORE', FINISH, '-inf', '(' .. string.format('%.17g', get('v'))) -- expired tags have no effect
  if own then call('ZADD', TEAMS, tag + share / weight, team) end
  if place then leave(member) end
  local m = get('m', 1)
  if m < 1 then set('m', min(1, m + RECOVERY * max(share, 1 / seats) / m)) end -- only while the rate is used
  if probing then set('bp', now + B_PROBE); set('bi', id) end
  local seq = get('seq', 0) + 1
  set('seq', seq)
  set('yes', get('yes', 0) + 1)
  call('ZADD', LEASES, now + lease, id)
  call('HSET', CALLS, id, cmsgpack.pack({team, weight, now, seq, share, reserved, before_it, lease}))
  save()
  keep()
  return granted()
end

local function count(failed) -- the breaker: calls and failures of the last ten seconds, by second
  local second, calls, failures, kept = math.floor(now / 1000), 1, failed and 1 or 0, {}
  for at, c, f in string.gmatch(get('bw', ''), '(%d+):(%d+):(%d+)') do
    if tonumber(at) == second then
      kept[#kept + 1] = at .. ':' .. (c + 1) .. ':' .. (failed and f + 1 or f)
      calls, failures = calls + c, failures + f
      second = nil
    elseif tonumber(at) > math.floor(now / 1000) - B_WINDOW then
      kept[#kept + 1] = at .. ':' .. c .. ':' .. f
      calls, failures = calls + c, failures + f
    end
  end
  if second then kept[#kept + 1] = second .. ':1:' .. (failed and 1 or 0) end
  set('bw', table.concat(kept, ' '))
  return calls >= B_CALLS and failures >= calls * B_SHARE
end

local function judge(id, outcome)
  local good = outcome == 'ok'
  local bad = outcome == 'failed' or outcome == 'overloaded'
  if get('bi') == id then
    set('bi', nil); set('bp', nil)
    if good then set('bo', nil); set('bn', nil); set('bw', nil)
    elseif bad then
      local times = get('bn', 1)
      set('bn', times + 1)
      set('bo', now + min(B_LONGEST, B_FIRST * 2 ^ times))
    end
  elseif (good or bad) and get('bo', 0) == 0 and count(bad) and bad then
    set('bo', now + B_FIRST); set('bn', 1); set('bw', nil)
  end
end

local function slow(outcome, after, named)
  refresh()
  if now - get('dec', 0) >= EPOCH then
    set('m', max(FLOOR, get('m', 1) * DECREASE)); set('dec', now); set('f', FIRST)
  end
  local times = get('c9', 0) + 1
  set('c9', times)
  if outcome == 'rate_limited' then
    set('n429', get('n429', 0) + 1)
    for _, d in ipairs(DIMENSIONS) do if limit(d) and d ~= 'd' then put(d, min(0, level(d))) end end
    if after < 0 then after = min(30000, 500 * 2 ^ min(times, 10)) end
  end
  if after >= 0 then
    local shut = now + after
    -- If headers name the model's own limits, only the model is blocked.  Otherwise the exceeded limit is unknown, and
    -- the whole account is blocked.
    if named then set('closed', max(get('closed', 0), shut))
    else call('HSET', ACCOUNT, 'closed', max(tonumber(call('HGET', ACCOUNT, 'closed') or 0), shut)) end
  end
end

local function learn(d, capped, left, resets, absolute, seen, seq, since, lease)
  if capped >= 0 and capped ~= get(d .. 'c') then
    refresh()
    set(d .. 'c', capped)
    local has = limit(d) and level(d)
    set(d .. 'L', get(d .. 'H', -1) >= 0 and min(capped, get(d .. 'H')) or capped)
    if has then put(d, min(has, capacity(d))) end
  end
  if left < 0 or not limit(d) then return nil end
  local ends
  if resets >= 0 then
    ends = absolute and now + resets or seen + resets
    if ends <= now then return nil end -- the reset of a window that has ended
    local known, first = get(d .. 'ra'), get(d .. 'r0', 0)
    if known and now < known and math.abs(ends - first) <= STILL then
      if ends > known then set(d .. 'ra', ends) end
      if now - get(d .. 'rt', now) >= WATCH then set(d .. 'w', 1) end -- it does not move: a window, not a bucket
    else
      if known and now < known - 2 * STILL and ends > first + STILL then set(d .. 'w', 0) end -- it moves: a bucket
      set(d .. 'ra', ends); set(d .. 'r0', ends); set(d .. 'rt', now)
    end
    ends = get(d .. 'ra')
  end
  if seq < get(d .. 'ps', 0) then return nil end -- a later call has already reported
  local rest = left - since
  local window = get(d .. 'w', 0) == 1 and ends
  if window then
    -- Calls that started just before this one may have arrived after it.
    rest = rest - call('ZCOUNT', LEASES, seen - CLOSE + lease, '(' .. string.format('%.17g', seen + lease)) * get(d .. 'n', 0)
  else
    rest = rest + max(0, now - seen) * limit(d) / PERIOD[d]
  end
  set(d .. 'p', rest); set(d .. 'pa', now); set(d .. 'ps', seq)
  set(d .. 'pe', window and ends + 5 or now + 60000)
  return rest >= get(d .. 'n', 0)
end

local function settle()
  local id, outcome, after = ARGV[3], ARGV[4], tonumber(ARGV[5])
  call('ZREM', LEASES, id)
  local packed = call('HGET', CALLS, id)
  if not packed then return 0 end -- already settled, or forgotten
  call('HDEL', CALLS, id)
  local team, weight, seen, seq, share, reserved, before_it, lease = unpack(cmsgpack.unpack(packed))
  set('lat', 0.9 * get('lat', now - seen) + 0.1 * (now - seen))
  local real = 0
  for k, d in ipairs(DIMENSIONS) do
    local actual = tonumber(ARGV[5 + k])
    if actual < 0 then actual = reserved[k] end
    if limit(d) then
      real = max(real, actual * PERIOD[d] / limit(d) / 1000)
      local back = reserved[k] - actual
      set(d .. 'n', 0.9 * get(d .. 'n', actual) + 0.1 * actual)
      if back ~= 0 then
        local has = level(d)
        -- A refund may exceed the burst, by up to two calls, because this capacity was never used.
        if back > 0 then put(d, max(has, min(max(capacity(d), 2 * reserved[k]), has + back))) else put(d, has + back) end
        if get(d .. 'p') and seq > get(d .. 'ps', 0) then set(d .. 'p', get(d .. 'p') + back) end
      end
    end
  end
  local finish = call('ZSCORE', FINISH, team)
  if finish and real ~= share then
    call('ZADD', FINISH, 'XX', finish + (real - share) / weight, team)
    if call('ZSCORE', TEAMS, team) then call('ZINCRBY', TEAMS, (real - share) / weight, team) end
  end
  local agree, named = nil, false
  for k = 11, #ARGV - 4, 5 do
    local number = tonumber(ARGV[k])
    local d = DIMENSIONS[number]
    local since = get(d .. 'k', 0) - before_it[number]
    local said = learn(d, tonumber(ARGV[k + 1]), tonumber(ARGV[k + 2]), tonumber(ARGV[k + 3]), ARGV[k + 4] == '1',
      seen, seq, since, lease)
    named = true
    if said ~= nil then agree = (agree == nil or agree) and said end
  end
  if outcome == 'rate_limited' or outcome == 'overloaded' then
    slow(outcome, after, named)
  elseif outcome == 'ok' then
    set('c9', nil)
    if agree and get('f', FIRST) < FULL then
      refresh()
      set('f', min(FULL, get('f', FIRST) + RAISE * min(1000, max(0, now - get('fa', now))) / 1000))
    end
    if agree then set('fa', now) end
  end
  judge(id, outcome)
  save()
  keep()
  return 1
end

local function extend()
  local lease, held = tonumber(ARGV[3]), 0
  for k = 4, #ARGV do
    if call('ZSCORE', LEASES, ARGV[k]) then
      call('ZADD', LEASES, 'XX', now + lease, ARGV[k])
      held = held + 1
    end
  end
  return held
end

local function debit() -- what a worker used on its own; all workers together deduct at most the capacity of a bucket
  refresh()
  local share = max(1, call('ZCARD', WORKERS))
  for k, d in ipairs(DIMENSIONS) do
    local amount = tonumber(ARGV[2 + k])
    if limit(d) and amount > 0 then put(d, level(d) - min(amount, d == 'd' and amount or capacity(d) / share)) end
  end
  save()
end

local function snapshot()
  tidy()
  save()
  local levels, telling = {}, {}
  for _, d in ipairs(DIMENSIONS) do
    if limit(d) then
      levels[NAMES[d]] = {
        limit = limit(d), level = level(d), told = told(d), learned = get(d .. 'c') ~= nil, set = get(d .. 'H') == limit(d)
      }
    end
  end
  local teams = {}
  for _, team in ipairs(call('ZRANGE', TEAMS, 0, -1)) do
    local line = call('HMGET', LINE, team .. '\nE', team .. '\nG')
    teams[team] = tonumber(line[1] or 0) - tonumber(line[2] or 0)
  end
  return cjson.encode({
    levels = levels, teams = teams, in_flight = call('ZCARD', LEASES), waiting = call('ZCARD', WAITERS),
    workers = call('ZCOUNT', WORKERS, now - SEEN, '+inf'), rate = get('f', FIRST) * get('m', 1),
    closed = max(0, max(get('closed', 0), tonumber(call('HGET', ACCOUNT, 'closed') or 0)) - now),
    breaker = max(0, get('bo', 0) - now), half_open = get('bo', 0) > 0 and get('bo', 0) <= now,
    granted = get('yes', 0), denied = get('no', 0), refused = get('n429', 0)
  })
end

local operations = {acquire = acquire, settle = settle, extend = extend, debit = debit, snapshot = snapshot}
return operations[ARGV[1]]()
