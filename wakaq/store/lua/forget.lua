-- Ends a rescue: takes a dead supervisor off the registry that has nothing in flight any more.
-- KEYS[1]  hash, supervisor id -> 'number token gave'    KEYS[2]  hash, supervisor id -> entry
-- KEYS     then three a queue: in flight (hash), head (list), queue (list)
-- ARGV[1]  supervisor id
-- Returns 1, or 0 if something is left in flight.
local MOST = 1000 -- of a head
redis.call('HDEL', KEYS[1], ARGV[1])
for i = 3, #KEYS, 3 do
  if redis.call('EXISTS', KEYS[i]) == 1 then return 0 end
end
for i = 3, #KEYS, 3 do
  for _ = 1, MOST do
    local payload = redis.pcall('LMOVE', KEYS[i + 1], KEYS[i + 2], 'RIGHT', 'LEFT')
    if type(payload) ~= 'string' then break end
  end
end
redis.call('HDEL', KEYS[2], ARGV[1])
return 1
